"""Which job is this, and may it go back into the queue? (With a real Slurm: tests/slurm.)"""

from pathlib import Path

import pytest

from smoe_hpc.launch.job import job_id, job_state, job_states, node_address, requeue_if_running

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1"}


def test_only_a_step_of_srun_belongs_to_its_job() -> None:
    assert job_id(STEP) == "77"
    assert job_id({**STEP, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}) == "70_7"
    assert job_id({"SLURM_JOB_ID": "77"}) is None, "a batch script"
    assert job_id({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)}) is None, "an interactive step"
    assert job_id({}) is None


def test_no_requeue_without_a_job_or_where_it_is_forbidden() -> None:
    assert not requeue_if_running({}).done
    forbidden = requeue_if_running({**STEP, "SMOE_REQUEUE": "0"})
    assert (forbidden.done, forbidden.why) == (False, "job 77 is not requeued (SMOE_REQUEUE=0)")


def test_without_slurm_nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_state("77") is None
    assert node_address("node1") is None
    asked = requeue_if_running(STEP)
    assert not asked.done
    assert asked.why.startswith("job 77 is unknown to Slurm: it is leaving, and Slurm decides what follows")


def test_several_jobs_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {
        "squeue": "12 PENDING\\n13_4 RUNNING",
        "scontrol": "JobId=14 JobState=FAILED\\nJobId=20 ArrayJobId=15 ArrayTaskId=2 JobState=COMPLETED\\n"
        "JobId=99 JobState=FAILED",
        "sacct": "16|CANCELLED by 0",
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\nprintf "{answer}\\n"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    states = job_states(["12", "13_4", "14", "15_2", "16", "17", "12"])
    assert states == {"12": "PENDING", "13_4": "RUNNING", "14": "FAILED", "15_2": "COMPLETED", "16": "CANCELLED"}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["squeue", "scontrol", "sacct"]
    assert "--jobs=12,13_4,14,15_2,16,17" in asked[0]
    assert job_states([]) == {}
