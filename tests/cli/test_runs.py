"""train, evaluate and report: each verb's call into the package, most of them with the room behind it replaced."""

import json
from pathlib import Path

import pytest

from tests.cli.calling import SCORES, SMALL_HEAT, command, replace_room


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


def test_evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []

    def evaluate(run, split, **options):  # type: ignore[no-untyped-def]
        seen.append((run, split, options))
        return SCORES["test"]

    replace_room(monkeypatch, "smoe_hpc.experiments", evaluate=evaluate)
    result = command("evaluate", "runs/x", "--json", "s.json")
    assert result.exit_code == 0, result.output
    assert seen == [(Path("runs/x"), "test", {"data": None, "first": None, "last": None})]
    assert json.loads((tmp_path / "s.json").read_text()) == SCORES
    assert "region_0" in result.stdout


def test_report_says_what_it_drew(monkeypatch: pytest.MonkeyPatch):
    replace_room(monkeypatch, "smoe_hpc.report", make_pictures=lambda run: [run / "curves.png", run / "filters.png"])
    result = command("report", "runs/a", "runs/b")
    assert result.exit_code == 0
    assert result.stdout.split() == [f"runs/{run}/{name}.png" for run in "ab" for name in ("curves", "filters")]


def test_report_of_a_run_without_steps():
    from smoe_hpc.config import load_recipe
    from smoe_hpc.runs.directory import RunDirectory

    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    run = RunDirectory(Path("run"))
    run.path.mkdir()
    run.claim(load_recipe("heat_smoe", []))
    result = command("report", "run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "run: there is nothing to draw" in result.stderr
    assert "train it first" in result.stderr


def test_a_run_of_before_a_key_was_renamed_goes_on(tmp_path: Path):
    """Its config.yaml calls the loader's backend by its earlier name; one warning says so."""
    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    short = ["training.batch=8", "training.validate_every=2", "run.pictures=false"]
    assert command("train", "heat_quickstart", *short, "training.max_steps=2").exit_code == 0
    config = tmp_path / "runs/heat_quickstart/config.yaml"
    text = config.read_text()
    assert "backend: threads" in text
    config.write_text(text.replace("backend: threads", "front: plain"))
    scored = command("evaluate", "runs/heat_quickstart")
    assert scored.exit_code == 0, scored.output
    longer = command("train", "heat_quickstart", *short, "training.max_steps=4")
    assert longer.exit_code == 0, longer.output
    assert "goes on from step 2" in longer.stderr
    assert longer.stderr.count("warning: ") == 1
    assert "warning: loader.front=plain has another name now; write loader.backend=threads\n" in longer.stderr
    assert config.read_text() == text.replace("max_steps: 2", "max_steps: 4"), "from now on by its present name"
