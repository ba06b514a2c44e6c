"""`sbatch slurm/smoe_1p4deg.sh` on two nodes: from nothing to scores, taken away in the middle, and told what is missing.

The reference is one job that nobody disturbs; every other way of training the same recipe with two processes has to
write the same curve and the same scores, to the bit.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.errors import RunError
from smoe_hpc.launch import submit
from smoe_hpc.launch.rendezvous import free_port
from tests.slurm.conftest import ROOT, Slurm, clean_environment, wait_until

pytestmark = pytest.mark.slurm
SCRIPT = ROOT / "slurm" / "smoe_1p4deg.sh"
STEPS = 60
SMALL = {
    "model.blocks": "1",
    "model.width": "4",
    "model.num_experts": "8",
    "model.stem_kernel": "3",
    "model.ghost_batch": "2",
    "training.batch": "4",
    "training.max_steps": str(STEPS),
    "training.validate_every": str(STEPS // 2),
    "training.epochs": "1000",
    "run.log_every": "1",
    "run.checkpoint_every": "20",
}
SYNTHETIC = {"SMOE_SYNTHETIC": "1", "SMOE_SYNTHETIC_ARGS": "--grid 16x32 --days 40"}
ARGS = " ".join(f"{key}={value}" for key, value in SMALL.items())
NAME = "weather_smoe_1p4deg_synthetic"


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    curve: bytes
    scores: bytes

    @staticmethod
    def of(run: Path) -> "Outcome":
        return Outcome((run / "metrics.jsonl").read_bytes(), (run / "scores.json").read_bytes())


@dataclass(frozen=True)
class Reference:
    """The undisturbed job."""

    data: Path
    outcome: Outcome
    log: str
    job: dict[str, str]

    def changes(self) -> dict[str, str]:
        """The recipe's changes as the script made them."""
        command = [sys.executable, "-m", "smoe_hpc", "data", "splits", str(self.data)]
        splits = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout.split()
        plain = {"loader.backend": "threads"}  # the script takes DALI where it is installed: the same samples in the same order
        return {"data.store": str(self.data), "name": NAME, **dict(line.split("=", 1) for line in splits), **SMALL, **plain}


@pytest.fixture(scope="module")
def reference(slurm: Slurm, environment_script: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    variables = {**SYNTHETIC, "SMOE_ENV": environment_script, "SMOE_ARGS": ARGS, "SMOE_ROOT": str(ROOT)}
    job = slurm.sbatch(SCRIPT, folder, SMOE_DATA=str(folder / "data"), **variables)
    about = slurm.wait(job, ("COMPLETED", "FAILED", "CANCELLED"), 180)
    log = (folder / "log").read_text()
    assert about["JobState"] == "COMPLETED", log
    return Reference(folder / "data", Outcome.of(folder / "runs" / NAME), log, dict(about))


def test_from_nothing_to_scores(reference: Reference) -> None:
    scores = json.loads(reference.outcome.scores)
    assert set(scores) == {"validation", "test"}
    assert all(name in " ".join(scores["test"]["all"]) for name in ("z500", "t850", "t2m"))
    events = [json.loads(line) for line in reference.outcome.curve.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, STEPS + 1))


def test_the_first_page_says_what_runs_where(reference: Reference) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    nodes = f"{reference.job['JobId']}, 2 nodes (node[1-2]), 1 tasks a node, 1 cores a task"
    page = reference.log.partition("making synthetic data")[0]
    for words in (nodes, "trains on the CPU", str(reference.data), "SYNTHETIC", f"commit {commit}", "torch 2.", "slurm"):
        assert words in page
    assert "restart" not in page.splitlines()[0]
    assert f"python -m smoe_hpc train weather_smoe_1p4deg data.store={reference.data}" in reference.log


def test_a_job_that_is_taken_away_twice_ends_the_same(
    slurm: Slurm, reference: Reference, environment_script: str, tmp_path: Path
) -> None:
    """Asked to save while it starts, and requeued from outside in the middle of training."""
    variables = {**SYNTHETIC, "SMOE_ENV": slow_scontrol(environment_script, tmp_path), "SMOE_ROOT": str(ROOT)}
    variables["SMOE_DATA"] = str(reference.data)
    job = slurm.sbatch(SCRIPT, tmp_path, SMOE_ARGS=f"{ARGS} loader.backend=threads", **variables)
    run, log = tmp_path / "runs" / NAME, tmp_path / "log"
    wait_until((run / "lock").exists, 90, lambda: log.read_text() if log.exists() else "no log")
    slurm.run("scancel", "--signal=USR1", job)  # as `--signal=USR1@300` does when the time is nearly up
    assert slurm.wait(job, ("PENDING",))["Restarts"] == "1"
    wait_until(lambda: f"job {job} is requeued" in log.read_text(), 30, log.read_text)  # said after Slurm has been asked
    assert "(SIGUSR1) after step 2," in log.read_text()
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    wait_until((run / "checkpoints" / "step_20").exists, 90, log.read_text)
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait(job, ("PENDING",))["Restarts"] == "2"
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    about = slurm.wait(job, ("COMPLETED", "FAILED"))
    assert (about["JobState"], about["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    assert ", restart 2" in log.read_text()
    assert "synthetic_2015.h5" in log.read_text()
    assert "MB, written" not in log.read_text()
    assert Outcome.of(run) == reference.outcome


def test_a_warning_while_data_are_made_requeues_the_job(slurm: Slurm, environment_script: str, tmp_path: Path) -> None:
    """Half a year is removed, and nothing of the job is left running."""
    data, log = tmp_path / "data", tmp_path / "log"
    variables = {"SMOE_ENV": environment_script, "SMOE_ROOT": str(ROOT), "SMOE_DATA": str(data), "SMOE_SYNTHETIC": "1"}
    job = slurm.sbatch(SCRIPT, tmp_path, SMOE_SYNTHETIC_ARGS="--grid 32x64 --years 6 --dtype int16", **variables)
    wait_until(lambda: any(data.glob("*.h5.*")), 60, lambda: log.read_text() if log.exists() else "no log")
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait(job, ("PENDING", "FAILED", "COMPLETED"), 60)["Restarts"] == "1", log.read_text()
    assert "synthesizing samples: stopped as asked (SIGUSR1); what is whole is kept" in log.read_text()
    wait_until(lambda: f"job {job} is requeued" in log.read_text(), 30, log.read_text)
    assert "Traceback" not in log.read_text()
    assert list(data.glob("*.h5.*")) == []
    slurm.run("scancel", job)


def test_other_data_than_asked_for_are_an_error(
    slurm: Slurm, reference: Reference, environment_script: str, tmp_path: Path
) -> None:
    """Neither is another SMOE_SYNTHETIC_ARGS ignored, nor are data that were not made up trained on as if they were."""
    variables = {"SMOE_ENV": environment_script, "SMOE_ROOT": str(ROOT), "SMOE_DATA": str(reference.data)}
    job = slurm.sbatch(SCRIPT, tmp_path, SMOE_SYNTHETIC="1", SMOE_SYNTHETIC_ARGS="--grid 16x32 --days 41", **variables)
    about = slurm.wait(job, ("COMPLETED", "FAILED"), 60)
    log = (tmp_path / "log").read_text()
    assert (about["JobState"], about["ExitCode"]) == ("FAILED", "2:0"), log
    assert "synthetic_2015.h5 holds other data" in log
    assert "making synthetic data failed with status 2; see above" in log.splitlines()[-1]


def test_torchrun_trains_the_same(reference: Reference, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    overrides = [f"{key}={value}" for key, value in {**reference.changes(), "run.root": str(tmp_path)}.items()]
    done = subprocess.run(
        [*command, "-m", "smoe_hpc", "train", "weather_smoe_1p4deg", *overrides],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert Outcome.of(tmp_path / NAME) == reference.outcome


def test_submitit_on_this_machine_trains_the_same(
    slurm: Slurm, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, slurm)
    job = submit("weather_smoe_1p4deg", reference.changes(), cluster="local", tasks_per_node=2, root=tmp_path, time=60)
    assert job.result(timeout=180) == json.loads(reference.outcome.scores)
    assert job.state == "COMPLETED"
    assert Outcome.of(job.run_dir) == reference.outcome
    assert "Job completed successfully" in job.log(1)


def test_submitit_on_slurm_is_requeued_and_ends_the_same(
    slurm: Slurm, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, slurm)
    job = submit("weather_smoe_1p4deg", reference.changes(), nodes=2, root=tmp_path, time=60, sbatch={"hold": True})
    assert re.search(rf"queued .* {job.id} PENDING", CliRunner().invoke(app, ["status", str(tmp_path)]).output)
    slurm.run("scontrol", "release", job.id)
    wait_until((job.run_dir / "checkpoints" / "step_20").exists, 90, job.log)
    slurm.run("scancel", "--signal=USR2", job.id)  # submitit's own
    assert slurm.wait(job.id, ("PENDING",))["Restarts"] == "1"
    wait_until(lambda: f"job {job.id} is requeued" in job.log(), 30, job.log)
    assert job.state == "PENDING"
    slurm.run("scontrol", "update", f"JobId={job.id}", "StartTime=now")
    assert job.result(timeout=180) == json.loads(reference.outcome.scores)
    assert job.state == "COMPLETED"
    assert Outcome.of(job.run_dir) == reference.outcome


def test_a_cancelled_job_saves_and_stays_cancelled(
    slurm: Slurm, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, slurm)
    longer = {**reference.changes(), "training.max_steps": "100000"}
    job = submit("weather_smoe_1p4deg", longer, nodes=2, root=tmp_path, time=60)
    wait_until((job.run_dir / "checkpoints" / "step_20").exists, 90, job.log)
    listed = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert f"{job.id} RUNNING" in listed.output
    job.cancel()
    with pytest.raises(RunError, match=f"job {job.id} ended as CANCELLED: .*stopped as asked"):
        job.result(timeout=60)
    assert slurm.about(job.id)["Restarts"] == "0"
    assert f"stopped as asked (SIGTERM) after step {steps(job.run_dir)[-1]}, which is saved" in job.log()


def test_what_is_missing_is_one_line_within_seconds(slurm: Slurm, environment_script: str, tmp_path: Path) -> None:
    cases: dict[str, dict[str, str]] = {
        "no data at": {"SMOE_ROOT": str(ROOT), "SMOE_ENV": environment_script, "SMOE_DATA": str(tmp_path / "none")},
        "no environment at": {"SMOE_ROOT": str(ROOT), "SMOE_ENV": str(tmp_path / "none"), "SMOE_SYNTHETIC": "1"},
        "no checkout at": {"SMOE_ROOT": str(tmp_path), "SMOE_SYNTHETIC": "1"},
    }
    for number, (words, variables) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        begin = time.monotonic()
        job = slurm.sbatch(SCRIPT, folder, **variables)
        about = slurm.wait(job, ("COMPLETED", "FAILED"), 30)
        assert time.monotonic() - begin < 15
        assert (about["JobState"], about["ExitCode"]) == ("FAILED", "2:0")
        lines = (folder / "log").read_text().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error: {words}")
        assert "SMOE_" in lines[0]


def slow_scontrol(environment_script: str, folder: Path) -> str:
    """An environment in which Slurm does at once what scontrol asks for, and scontrol ends two seconds later."""
    slow = folder / "bin" / "scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{shutil.which("scontrol")} "$@" || exit\n[ "$1" != requeue ] || sleep 2\n')
    slow.chmod(0o755)
    script = folder / "activate.sh"
    script.write_text(f'{Path(environment_script).read_text()}export PATH="{slow.parent}:$PATH"\n')
    return str(script)


def enter(monkeypatch: pytest.MonkeyPatch, slurm: Slurm) -> None:
    """Make this process one that uses the Slurm."""
    environ = clean_environment(SLURM_CONF=slurm.conf)
    for name in [name for name in os.environ if name not in environ]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def steps(run: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*[0-9]"))
