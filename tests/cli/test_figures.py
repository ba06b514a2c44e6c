"""The file of figures that a verb writes: the old one or the new one, never a part."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_hpc.cli.figures import write_json
from smoe_hpc.errors import ConfigError
from tests.cli.calling import SMALL_HEAT, command

ROOT = Path(__file__).resolve().parents[2]


def test_the_old_file_stays_where_the_new_one_has_no_room(tmp_path: Path):
    file = tmp_path / "figures.json"
    file.write_text("old")
    code = (
        "import sys, pathlib; from smoe_hpc.cli.figures import write_json; write_json(pathlib.Path(sys.argv[1]), ['x' * 4096])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)),
        capture_output=True,
        text=True,
    )
    assert f"ConfigError: --json: cannot write {file}: File too large" in done.stderr
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_others_can_read_it_and_its_folder_is_made(tmp_path: Path):
    file = tmp_path / "folder" / "figures.json"
    for content in ({"a": 1}, {"a": 2}):
        write_json(file, content)
        assert json.loads(file.read_text()) == content
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "figures.json", tmp_path / "link.json"
    file.write_text("old")
    link.symlink_to(file)
    write_json(link, [1])
    assert link.is_symlink()
    assert json.loads(file.read_text()) == [1]


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(pipe, [1])
        assert json.loads(os.read(reader, 100)) == [1]
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    write_json(Path(os.devnull), [1])
    assert Path(os.devnull).is_char_device()


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write_json(tmp_path, [1])


def test_it_needs_no_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "smoe_hpc.io.atomic", None)  # as where HDF5 is broken, which the doctor tells
    write_json(tmp_path / "figures.json", [1])
    assert json.loads((tmp_path / "figures.json").read_text()) == [1]


@pytest.mark.parametrize(
    "verb", ["train heat_smoe", "evaluate runs/x", "compare heat_smoe", "quickstart", "data inspect x.h5", "bench status x"]
)
def test_a_json_file_that_cannot_be_written_is_found_out_before_any_work(verb: str, trained: list[dict[str, object]]):
    result = command(*verb.split(), "--json", "/proc/none/x.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --json /proc/none/x.json: cannot be written")
    assert trained == []


def test_a_json_file_that_can_be_written_is_left_alone_until_then(tmp_path: Path):
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        assert command("data", "inspect", "none.h5", "--json", name).exit_code == 2
    assert (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "new.json").exists()


# -- standard output -----------------------------------------------------------------------------------------------------


def test_standard_output_holds_the_figures_alone():
    result = command("recipes", "--json", "-")
    assert result.exit_code == 0
    assert "the paper's own settings" in json.loads(result.stdout)["heat_smoe"]
    assert "heat_smoe " in result.stderr, "the table"


def test_every_verb_with_figures_takes_standard_output():
    verbs = ["train", "evaluate", "compare", "quickstart", "submit", "status", "recipes", "doctor", "kernels build"]
    verbs += ["data inspect", "data verify", "data statistics", "bench layer", "bench loader", "bench status"]
    for verb in verbs:
        assert "- is standard output" in " ".join(command(*verb.split(), "--help").stdout.replace("│", " ").split()), verb


def test_an_error_leaves_standard_output_empty():
    result = command("data", "inspect", "none.h5", "--json", "-")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert command("recipes").stdout.startswith("heat_cond_conv"), "later commands print as ever"


@pytest.fixture
def noisy() -> list[str]:
    """A command whose verb prints in every way that there is, also in C, and gives figures twice."""
    code = (
        "import ctypes, os, subprocess, sys, typer\n"
        "from smoe_hpc.cli.commands import Commands\n"
        "from smoe_hpc.cli.figures import JsonFile, write_json\n"
        "from smoe_hpc.cli.output import progress, say, show_table\n"
        "app = typer.Typer(cls=Commands)\n"
        "@app.callback()\n"
        "def _app() -> None: ...\n"
        "@app.command()\n"
        "def verb(end: str = '', json_file: JsonFile = None) -> None:\n"
        "    print('printed'); say('said'); show_table('table', ['a'], [['b']])\n"
        "    os.write(1, b'written\\n'); subprocess.run(['echo', 'echoed'])\n"
        "    ctypes.CDLL(None).puts(b'put')\n"
        "    with progress('working') as report: report(1, 1)\n"
        "    write_json(json_file, [1])\n"
        "    if end: raise {'error': ValueError, 'interrupt': KeyboardInterrupt}[end]()\n"
        "    write_json(json_file, {'a': 2})\n"
        "app()\n"
    )
    return [sys.executable, "-c", code, "verb"]


@pytest.mark.parametrize(("end", "figures", "status"), [("", {"a": 2}, 0), ("error", [1], 1), ("interrupt", [1], 130)])
def test_nothing_else_reaches_standard_output(noisy: list[str], end: str, figures: object, status: int):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*noisy, "--json", "-", "--end", end], capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout) == figures
    assert done.returncode == status
    for word in ("printed", "said", "table", "written", "echoed", "put", "working: 1/1"):
        assert word in done.stderr
    usual = subprocess.run(noisy, capture_output=True, text=True, env=environment)
    assert {"printed", "said", "written", "echoed", "put"} <= set(usual.stdout.split())


def test_training_gives_its_scores_to_standard_output():
    """DeepSpeed and MPI print what they like."""
    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    short = ["training.batch=8", "training.max_steps=2", "training.validate_every=2", "run.pictures=false"]
    words = [sys.executable, "-m", "smoe_hpc", "train", "heat_quickstart", *short, "--json", "-"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(Path("runs/heat_quickstart/scores.json").read_text())
    assert "within_1pct" in done.stderr
