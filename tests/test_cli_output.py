"""The file of figures that a verb writes: the old one or the new one, never a part."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_hpc.cli.output import write_json
from smoe_hpc.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_the_old_file_stays_where_the_new_one_has_no_room(tmp_path: Path):
    file = tmp_path / "figures.json"
    file.write_text("old")
    code = (
        "import sys, pathlib; from smoe_hpc.cli.output import write_json; write_json(pathlib.Path(sys.argv[1]), ['x' * 4096])"
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
