"""The command in processes of its own: errors, from data to scores, and compare, which keeps a budget from outside."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.jobs import budget
from smoe_hpc.jobs.compare import compared_score

ROOT = Path(__file__).resolve().parents[2]
SMALL_HEAT = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]


def command(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, arguments, prog_name="smoe-hpc")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_compare_makes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls: list[tuple[list[str], float | None]] = []

    def run(arguments: list[str], seconds: float | None) -> int:
        calls.append((list(arguments), seconds))
        if arguments[0] == "evaluate":
            share = 100.0 if "heat_smoe" in arguments[1] else 40.0
            Path(arguments[-1]).write_text(json.dumps({"test": {"all": {"within_1pct": share, "rmse": 1.0}}}))
            return 0
        return 0 if arguments[1] == "heat_smoe" else budget.STOPPED

    monkeypatch.setattr(budget, "run_verb", run)
    result = command("compare", "heat_smoe", "heat_conv2", "training.seed=4", "--minutes", "2", "--json", "t.json")
    assert result.exit_code == 0, result.output
    assert calls[0] == (["train", "heat_smoe", "training.seed=4", "--resume"], 120.0)
    assert "test split: within_1pct, at most 2 minutes each" in " ".join(result.stdout.split())
    table = {row["recipe"]: row for row in json.loads((tmp_path / "t.json").read_text())}
    assert (table["heat_smoe"]["scores"]["all"]["within_1pct"], table["heat_smoe"]["ended"]) == (100.0, "finished")
    assert (table["heat_conv2"]["scores"]["all"]["within_1pct"], table["heat_conv2"]["ended"]) == (40.0, "budget spent")


def test_compare_within_a_budget_is_for_one_process(monkeypatch: pytest.MonkeyPatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(budget, "run_verb", lambda *_, **__: pytest.fail("nothing is to be trained"))
    result = command("compare", "heat_smoe", "--minutes", "1")
    assert result.exit_code == 2
    assert "--minutes: this is one of 2 processes" in result.stderr


def test_compare_stops_at_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "run_verb", lambda arguments, seconds: 2)
    result = command("compare", "heat_smoe", "--minutes", "1")
    assert result.exit_code == 2
    assert "heat_smoe: training ended with status 2" in result.stderr


def test_without_a_budget_recipes_run_to_their_end(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def compare(recipes: list[str], overrides: list[str], *, seconds: None, resume: bool) -> list[types.SimpleNamespace]:
        calls.append((recipes, overrides, resume))
        return [types.SimpleNamespace(recipe="uk_t2m_conv", scores={"all": {"loss": 1.0, "rmse": 2.0}})]

    room = types.ModuleType("smoe_hpc.jobs.compare")
    room.compared_score = compared_score  # type: ignore[attr-defined]
    room.compare = compare  # type: ignore[attr-defined]
    room.as_table = lambda rows, score, heading: f"{rows[0].recipe} {score} {heading}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smoe_hpc.jobs.compare", room)
    result = command("compare", "uk_t2m_conv", "training.seed=1", "--fresh")
    assert calls == [(["uk_t2m_conv"], ["training.seed=1"], False)]
    assert result.stdout == "uk_t2m_conv rmse test split: rmse\n"


def test_as_many_steps_for_each_recipe(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def compare(recipes: list[str], overrides: list[str], *, seconds: None, resume: bool) -> list[types.SimpleNamespace]:
        calls.append((recipes, overrides))
        return [types.SimpleNamespace(recipe="heat_smoe", scores={"all": {"within_1pct": 2.0}})]

    room = types.ModuleType("smoe_hpc.jobs.compare")
    room.compared_score = compared_score  # type: ignore[attr-defined]
    room.compare = compare  # type: ignore[attr-defined]
    room.as_table = lambda rows, score, heading: heading  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smoe_hpc.jobs.compare", room)
    assert command("compare", "heat_smoe", "heat_lcn", "training.seed=1", "--steps", "50").exit_code == 0
    assert calls == [(["heat_smoe", "heat_lcn"], ["training.seed=1", "training.max_steps=50"])]
    both = command("compare", "heat_smoe", "--steps", "50", "--minutes", "1")
    assert both.exit_code == 2
    assert "--steps and --minutes are two measures; give one" in both.stderr


def test_a_real_process_says_what_is_wrong_and_exits_with_2():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "smoe_hpc", "train", "heat_smo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe 'heat_smo'; did you mean heat_smoe?")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert time.monotonic() - start < 30


def test_train_evaluate_for_real(tmp_path: Path):
    """From data to scores in processes of their own, as a user runs them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "smoe_hpc", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    made = run("data", "heat", "data/heat", *SMALL_HEAT)
    assert made.returncode == 0, made.stderr
    short = ["training.batch=8", "training.max_steps=4", "training.validate_every=2", "run.pictures=false"]
    trained = run("train", "heat_quickstart", *short, "--json", "train.json")
    assert trained.returncode == 0, trained.stderr
    repeated = run("train", "heat_quickstart", *short)
    assert "ended at step 4 (training.max_steps=4), so nothing was trained" in repeated.stderr
    assert "To train on give a larger training.max_steps, to train anew another --run-name" in repeated.stderr
    scored = run("evaluate", "runs/heat_quickstart", "--json", "again.json")
    assert scored.returncode == 0, scored.stderr
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("train.json", "again.json"))
    assert again["test"] == first["test"]
    longer = run("train", "heat_quickstart", *short, "training.max_steps=6")
    assert longer.returncode == 0, longer.stderr
    assert "goes on from step 4" in longer.stderr
    assert "nothing was trained" not in longer.stderr
    short[1] = "training.max_steps=6"
    other = run("train", "heat_quickstart", *short, "optimizer.lr=0.5")
    assert other.returncode == 2
    assert "belongs to another recipe: optimizer.lr=0.5" in other.stderr
    assert run("data", "heat", "data/heat", *SMALL_HEAT, "--seed", "1", "--overwrite").returncode == 0
    changed = run("train", "heat_quickstart", *short)
    assert changed.returncode == 2
    assert "belongs to other train data than data/heat/heat_train.h5 holds now" in changed.stderr
