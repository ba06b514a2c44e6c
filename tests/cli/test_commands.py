"""The command as a whole: help, version, wrong usage, and how errors end it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import smoe_hpc
from smoe_hpc.errors import DataError, RunError
from tests.cli.calling import command, replace_room

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("arguments", [["train"], ["trian", "heat_smoe"], ["train", "heat_smoe", "--no-such"]])
def test_wrong_usage(arguments: list[str]):
    assert command(*arguments).exit_code == 2


def failing(error: BaseException) -> Callable[..., object]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def run_quickstart_that(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    replace_room(monkeypatch, "smoe_hpc.jobs.quickstart", run=failing(error))
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
    monkeypatch.setattr("smoe_hpc.cli.commands.this_rank", lambda: 3)
    result = run_quickstart_that(DataError("x.h5 does not exist"), monkeypatch)
    assert result.stderr == "error (rank 3): x.h5 does not exist\n"


def test_version():
    result = command("--version")
    assert (result.exit_code, result.stdout) == (0, f"smoe-hpc {smoe_hpc.__version__}\n")
