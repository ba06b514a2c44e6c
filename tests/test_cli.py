"""The command: help, errors, and each verb's call into the package, most of them with the room behind it replaced."""

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from smoe_hpc.cli import app
from smoe_hpc.errors import DataError, RunError

ROOT = Path(__file__).resolve().parent.parent
SMALL_HEAT = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]
SCORES = {"test": {"all": {"within_1pct": 99.5}, "region_0": {"within_1pct": 100.0}}}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process, in an empty folder, whatever started the tests."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="smoe-hpc")


def replace_room(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., object]) -> None:
    """Put a module with these functions in the place of a room."""
    room = types.ModuleType(name)
    for key, function in functions.items():
        setattr(room, key, function)
    monkeypatch.setitem(sys.modules, name, room)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Calls of a training that takes no time."""
    calls: list[dict[str, object]] = []

    def train(recipe, task, *, run_dir, resume):  # type: ignore[no-untyped-def]
        calls.append({"recipe": recipe, "task": task, "run_dir": run_dir, "resume": resume})
        return SCORES

    replace_room(monkeypatch, "smoe_hpc.training", train_or_requeue=train)
    replace_room(monkeypatch, "smoe_hpc.tasks", make_task=lambda recipe: f"task of {recipe.name}")
    return calls


# -- help ------------------------------------------------------------------------------------------------------------


VERBS = ["", "train", "evaluate", "report", "compare", "recipes", "doctor", "quickstart", "data", "submit", "status"]


@pytest.mark.parametrize("verb", [*VERBS, "data heat", "data convert", "data inspect"])
def test_help(verb: str):
    result = command(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: smoe-hpc" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from smoe_hpc.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'h5py', 'omegaconf', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- train -----------------------------------------------------------------------------------------------------------


def test_train_calls_the_package_and_writes_scores(trained: list[dict[str, object]], tmp_path: Path):
    result = command("train", "heat_smoe", "training.seed=3", "--json", "out/scores.json")
    assert result.exit_code == 0
    (call,) = trained
    assert call["run_dir"] == Path("runs/heat_smoe")
    assert call["resume"] is True
    assert call["task"] == "task of heat_smoe"
    assert call["recipe"].training.seed == 3  # type: ignore[attr-defined]
    assert "99.5" in result.stdout
    assert json.loads((tmp_path / "out/scores.json").read_text()) == SCORES


def test_run_name_and_fresh(trained: list[dict[str, object]]):
    assert command("train", "heat_smoe", "run.root=elsewhere", "--run-name", "second", "--fresh").exit_code == 0
    assert trained[0]["run_dir"] == Path("elsewhere/second")
    assert trained[0]["resume"] is False


def test_only_the_first_rank_prints(trained: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    result = command("train", "heat_smoe", "model.routing_loss.quantile=0.9", "--json", "scores.json")
    assert (result.exit_code, result.output) == (0, "")
    assert len(trained) == 1
    assert not (tmp_path / "scores.json").exists()
    assert command("train", "heat_smo").output == "", "the first rank says it"


def test_a_world_that_cannot_share_the_batch(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    result = command("train", "heat_smoe")
    assert result.exit_code == 2
    assert "must be a multiple of 3" in result.stderr


def test_a_warning_is_one_line(trained: list[dict[str, object]]):
    result = command("train", "heat_smoe", "model.routing_loss.quantile=0.9")
    assert result.exit_code == 0
    assert result.stderr.count("warning: model.routing_loss.quantile=0.9") == 1
    assert result.stderr.count("\n") == 1


def test_dry_run(tmp_path: Path):
    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    result = command("train", "heat_smoe", "--dry-run", "training.batch=8", "--json", "plan.json")
    assert result.exit_code == 0, result.output
    assert "quantile: 0.3" in result.stdout, "the resolved recipe"
    plan = json.loads((tmp_path / "plan.json").read_text())
    # 4 / 2 / 2 runs of 11 states make 10 pairs each; 27 expert weights and 3 x 12 x 12 gate values
    assert plan == {
        "parameters": 27 + 3 * 144,
        "samples": {"train": 40, "validation": 20, "test": 20},
        "steps_per_epoch": 5,
        "world": 1,
    }
    assert not (tmp_path / "runs").exists()
    too_many = command("train", "heat_smoe", "--dry-run", "training.batch=64")
    assert too_many.exit_code == 2
    assert "training.batch=64: the training split holds only 40 samples" in too_many.stderr


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "heat_smoe", "training.bach=8"], "did you mean training.batch?"),
        (["train", "heat_smoe", "training.batch=x"], "expected a whole number"),
        (["train", "heat_smoe", "training.batch"], "an override is key=value"),
        (["train", "heat_smoe", "model.channels=[4]"], "there are only 3"),
        (["train", "heat_smoe"], "heat_train.h5"),
        (["evaluate", "runs/none"], "runs/none"),
        (["evaluate", "runs/none", "--split", "tets"], "did you mean test?"),
        (["compare", "training.batch=8"], "no recipe to compare"),
        (["data", "inspect", "none.h5"], "none.h5"),
        (["data", "convert", "none.grib", "out.h5"], "none.grib"),
        (["recipes", "--json", "/proc/none/x.json"], "--json /proc/none/x.json: cannot be written"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments: list[str], message: str):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "verb", ["train heat_smoe", "evaluate runs/x", "compare heat_smoe", "quickstart", "data inspect x.h5", "bench routing"]
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


@pytest.mark.parametrize("arguments", [["train"], ["trian", "heat_smoe"], ["train", "heat_smoe", "--no-such"]])
def test_wrong_usage(arguments: list[str]):
    assert command(*arguments).exit_code == 2


def failing(error: BaseException) -> Callable[..., object]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def run_quickstart_that(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    replace_room(monkeypatch, "smoe_hpc.tasks.quickstart", run=failing(error))
    return command("quickstart")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    assert run_quickstart_that(KeyboardInterrupt(), monkeypatch).exit_code == 130


def test_a_run_that_was_asked_to_stop(monkeypatch: pytest.MonkeyPatch):
    error = RunError("stopped by SIGTERM at step 7; the same command goes on")
    error.exit_status = 75  # type: ignore[attr-defined]
    result = run_quickstart_that(error, monkeypatch)
    assert (result.exit_code, result.stderr) == (75, f"{error}\n")


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch):
    result = run_quickstart_that(ModuleNotFoundError("No module named 'cfgrib'", name="cfgrib"), monkeypatch)
    assert result.exit_code == 2
    assert "pip install 'smoe-hpc[convert]'" in result.stderr


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    result = run_quickstart_that(ZeroDivisionError(), monkeypatch)
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_error_of_another_rank_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smoe_hpc.cli.output.this_rank", lambda: 3)
    result = run_quickstart_that(DataError("x.h5 does not exist"), monkeypatch)
    assert result.stderr == "error (rank 3): x.h5 does not exist\n"


# -- the other verbs -------------------------------------------------------------------------------------------------


def test_quickstart_passes_its_folders(monkeypatch: pytest.MonkeyPatch):
    calls = []
    replace_room(monkeypatch, "smoe_hpc.tasks.quickstart", run=lambda *args, **more: calls.append((*args, more)))
    assert command("quickstart", "--out", "a", "--data", "b").exit_code == 0
    assert calls == [(Path("a"), Path("b"), {"json": None})]


def test_evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run_directory = type("RunDirectory", (), {"__init__": lambda self, path: None, "recipe": lambda self: "recipe"})
    seen = []

    def evaluate(run, split, *, task):  # type: ignore[no-untyped-def]
        seen.append((run, split, task))
        return SCORES["test"]

    replace_room(monkeypatch, "smoe_hpc.training", evaluate=evaluate, RunDirectory=run_directory)
    replace_room(monkeypatch, "smoe_hpc.tasks", make_task=lambda recipe: f"task of {recipe}")
    result = command("evaluate", "runs/x", "--json", "s.json")
    assert result.exit_code == 0, result.output
    assert seen == [(Path("runs/x"), "test", "task of recipe")]
    assert json.loads((tmp_path / "s.json").read_text()) == SCORES
    assert "region_0" in result.stdout


def test_report_says_what_it_drew(monkeypatch: pytest.MonkeyPatch):
    replace_room(monkeypatch, "smoe_hpc.report", make_pictures=lambda run: [run / "curves.png", run / "filters.png"])
    result = command("report", "runs/a", "runs/b")
    assert result.exit_code == 0
    assert result.stdout.split() == [f"runs/{run}/{name}.png" for run in "ab" for name in ("curves", "filters")]


def test_report_of_a_run_without_steps():
    from smoe_hpc.config import load_recipe
    from smoe_hpc.training import RunDirectory

    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    run = RunDirectory(Path("run"))
    run.path.mkdir()
    run.claim(load_recipe("heat_smoe", []))
    result = command("report", "run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "run: there is nothing to draw" in result.stderr
    assert "train it first" in result.stderr


def test_quickstart_with_other_data_there_says_what_to_do():
    assert command("data", "heat", "mine", *SMALL_HEAT).exit_code == 0
    result = command("quickstart", "--data", "mine")
    assert result.exit_code == 2
    assert "name another folder, or replace it with `smoe-hpc data heat mine --overwrite`" in result.stderr


@pytest.mark.parametrize("option", ["--noise", "--noise-ratio"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_noise_that_is_no_number(option: str, value: str, tmp_path: Path):
    result = command("data", "heat", "data/heat", *SMALL_HEAT, "--noise", "1", option, value)
    assert result.exit_code == 2
    assert "both of them finite" in result.stderr
    assert not (tmp_path / "data").exists()


def test_recipes(tmp_path: Path):
    result = command("recipes", "--json", "list.json")
    assert result.exit_code == 0
    assert "heat_smoe " in result.stdout
    assert "the paper's own settings" in json.loads((tmp_path / "list.json").read_text())["heat_smoe"]


def test_data_heat_and_inspect(tmp_path: Path):
    made = command("data", "heat", "data/heat", *SMALL_HEAT)
    assert made.exit_code == 0, made.output
    assert "data/heat/heat_test.h5" in made.stdout
    other = command("data", "heat", "data/heat", *SMALL_HEAT, "--seed", "1")
    assert other.exit_code == 2, "other data are not silently replaced"
    assert command("data", "heat", "data/heat", *SMALL_HEAT, "--seed", "1", "--overwrite").exit_code == 0
    shown = command("data", "inspect", "data/heat/heat_train.h5", "--json", "store.json")
    assert shown.exit_code == 0
    assert "constants: region, diffusivity" in shown.stdout
    assert json.loads((tmp_path / "store.json").read_text())["samples"]["count"] == 44


def test_doctor(tmp_path: Path):
    from smoe_hpc.launch import doctor

    found = [doctor.Finding("GPU", "absent", "none", "training runs on the CPU")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "inspect_machine", lambda: found)
        result = command("doctor", "--json", "machine.json")
    assert result.exit_code == 0
    assert "training runs on the CPU" in result.stdout
    assert json.loads((tmp_path / "machine.json").read_text())[0]["name"] == "GPU"
