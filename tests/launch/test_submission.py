"""What cannot be submitted is refused before anything is written; this machine runs what can (Slurm: tests/slurm)."""

from pathlib import Path

import pytest

from smoe_hpc.errors import ConfigError, LaunchError, RunError
from smoe_hpc.launch import Job, submit
from smoe_hpc.launch.submission import _slurm_options


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.bath": 4}, "training.bath"),
        ({"training.batch": "many"}, "training.batch"),
        ({"training.batch": 9}, "9"),  # not divisible by the number of processes
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        submit("heat_smoe", changes, cluster="local", tasks_per_node=2)
    with pytest.raises(ConfigError, match=words):
        submit("heat_smoe", cluster="local", tasks_per_node=2, **{key.replace(".", "__"): v for key, v in changes.items()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster": "pbs"}, "cluster='pbs' is none of slurm, local, debug"),
        ({"cluster": "local", "nodes": 2}, "this one machine"),
        ({"cluster": "debug", "tasks_per_node": 2}, "this one process"),
        ({"gpus_per_node": 4, "tasks_per_node": 2}, "each process takes one GPU"),
        ({"nodes": 0}, "nodes=0"),
        ({"time": 0}, "time=0"),
        ({"time": "1:00"}, "time='1:00'"),
        ({"tasks_per_node": 0}, "tasks_per_node=0"),
    ],
)
def test_a_job_that_cannot_be_is_refused(options: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=words):
        submit("heat_smoe", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_no_slurm_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"slurm does not take the job: .*srun"):
        submit("heat_smoe", nodes=2)


def test_options_of_sbatch() -> None:
    options = _slurm_options("x", 8, "gpu", None, 300, {"mem": "64G"})
    assert options["slurm_partition"] == "gpu"
    assert "slurm_account" not in options
    assert options["slurm_additional_parameters"] == {"requeue": True, "mem": "64G"}
    assert "SRUN_CPUS_PER_TASK=8" in options["slurm_setup"][0]


def test_a_local_job_that_fails_says_why(tmp_path: Path) -> None:
    job = submit("heat_smoe", data__store="nowhere", root=tmp_path / "runs", cluster="local", time=5)
    assert isinstance(job, Job)
    with pytest.raises(RunError, match=r"ended as FAILED: .*nowhere.*log is"):
        job.result(timeout=100)
    assert job.state == "FAILED"
    assert "nowhere" in job.log()
    with pytest.raises(LaunchError, match="no rank 1: it has 1"):
        job.log(1)
