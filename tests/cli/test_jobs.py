"""smoe-hpc submit and status: what they print of jobs and of runs."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_hpc.errors import RunError
from tests.cli.calling import command


def make_run(name: str, *events: dict[str, object], holder: str = "process 1 on a\n", ended: bool = False) -> Path:
    run = Path("runs", name)
    run.mkdir(parents=True)
    (run / "lock").write_text(holder)
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if ended:
        (run / "finished.json").write_text("{}")
    return run


def test_status_tells_runs_apart(tmp_path: Path) -> None:
    step = {"event": "step", "step": 7, "loss": 1.0}
    validation = {"event": "validation", "step": 7, "split": "validation", "scores": {"all": {"loss": 2.0, "rmse": 1.25}}}
    make_run("ended", step, validation, ended=True)
    make_run("stopped", step, holder="process 9 on node1 of Slurm job 12345678\n")
    running = make_run("training", {**step, "step": 8})
    (running / "metrics.jsonl").open("a").write('{"event": "ste')
    Path("runs", "no run").mkdir()
    with (running / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = command("status", "--json", "status.json")
    assert result.exit_code == 0, result.output
    rows = {row["run"]: row for row in json.loads((tmp_path / "status.json").read_text())}
    assert {name: (row["state"], row["step"]) for name, row in rows.items()} == {
        "ended": ("ended", "7"),
        "stopped": ("interrupted", "7"),
        "training": ("running", "8"),
    }
    assert rows["ended"]["score"] == "validation rmse 1.25"
    assert rows["stopped"]["job"] == "12345678 unknown"
    assert all(name in result.stdout for name in rows)


def test_status_shows_the_best_score(tmp_path: Path) -> None:
    """Training goes on after it, and does not take it back."""
    scores = {"all": {"loss": 2.0, "within_1pct": 40.0}}
    best = {"score": "within_1pct", "value": 99.5, "step": 3}
    make_run("worse", {"event": "validation", "step": 9, "split": "validation", "scores": scores, "best": best})
    assert command("status", "--json", "status.json").exit_code == 0
    (row,) = json.loads((tmp_path / "status.json").read_text())
    assert (row["step"], row["score"]) == ("9", "validation within_1pct 40")
    assert row["best"] == "validation within_1pct 99.5 (step 3)"


def test_status_shows_what_was_submitted_and_has_not_begun(tmp_path: Path) -> None:
    for name, left in {"new": "99_submitted.pkl", "broken": "99_0_result.pkl", "gone": "88888888_submission.sh"}.items():
        jobs = tmp_path / "runs" / name / "jobs"
        jobs.mkdir(parents=True)
        (jobs / left).touch()
    again = make_run("again", holder="process 9 on node1 of Slurm job 12345678\n")
    (again / "jobs").mkdir()
    (again / "jobs" / "12345679_submission.sh").touch()
    os.utime(again / "lock", (0, 0))
    assert command("status", "--json", "status.json").exit_code == 0
    rows = {row["run"]: (row["state"], row["job"]) for row in json.loads((tmp_path / "status.json").read_text())}
    assert rows == {
        "new": ("submitted", "-"),
        "broken": ("failed", "-"),
        "gone": ("failed", "88888888 unknown"),
        "again": ("interrupted", "12345679 unknown"),
    }


def test_status_imports_no_torch() -> None:
    make_run("one", {"event": "step", "step": 7})
    code = "import sys; from smoe_hpc.cli import app; app(['status', 'runs'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_status_of_nothing() -> None:
    assert "runs is no folder of runs" in command("status").stderr
    Path("runs").mkdir()
    assert command("status").stdout == "runs: no runs\n"


def test_submit_refuses_before_it_submits() -> None:
    result = command("submit", "heat_smoe", "training.bath=4", "--cluster", "local")
    assert result.exit_code == 2
    assert "training.bath" in result.stderr
    assert "an override is key=value" in command("submit", "heat_smoe", "training.batch").stderr
    assert "--sbatch is key=value" in command("submit", "heat_smoe", "--sbatch", "mem").stderr
    missing = command("submit", "heat_smoe", "--cluster", "local")
    assert missing.exit_code == 2
    assert "error: no data at" in missing.stderr
    assert not Path("runs").exists()


def test_submit_waits_for_scores(tmp_path: Path) -> None:
    small = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]
    assert command("data", "heat", "data/heat", *small).exit_code == 0
    short = ["training.batch=8", "training.max_steps=4", "training.validate_every=2", "run.pictures=false"]
    result = command("submit", "heat_quickstart", *short, "--cluster", "local", "--time", "5", "--wait", "--json", "job.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "job.json").read_text())
    assert told["scores"] == json.loads((tmp_path / "runs/heat_quickstart/scores.json").read_text())
    assert all(path in result.stdout for path in told["logs"])
    assert Path(told["logs"][0]).parent == tmp_path / "runs/heat_quickstart/jobs"
    assert f"progress and errors go to {told['logs'][1]}" in " ".join(result.stdout.split())
    assert "heat_quickstart: step 2, epoch" in Path(told["logs"][1]).read_text()
    told_of_run = command("status").stdout
    assert "ended" in told_of_run
    assert told_of_run.count("validation within_1pct") == 2  # the last and the best


def test_submit_names_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def submit(recipe: str, changes: dict[str, str], **_: object) -> None:
        calls.append((recipe, changes))
        raise RunError("enough")

    monkeypatch.setattr("smoe_hpc.launch.submit", submit, raising=False)
    assert command("submit", "heat_smoe", "training.seed=1", "--run-name", "second").exit_code == 2
    assert calls == [("heat_smoe", {"training.seed": "1", "name": "second"})]
    command("submit", "heat_smoe", "name=third")
    assert calls[1] == ("heat_smoe", {"name": "third"})


def test_the_second_run_is_a_folder_beside_the_first(tmp_path: Path) -> None:
    small = ["--runs", "1", "1", "1", "--grid", "8", "8", "--steps", "4"]
    assert command("data", "heat", "data/heat", *small).exit_code == 0
    short = ["training.batch=2", "training.max_steps=1", "run.pictures=false"]
    options = ["--run-name", "second", "--cluster", "local", "--time", "5", "--wait", "--json", "-"]
    result = command("submit", "heat_quickstart", *short, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["run"] == str(tmp_path / "runs" / "second")
    assert (tmp_path / "runs" / "second" / "scores.json").exists()
