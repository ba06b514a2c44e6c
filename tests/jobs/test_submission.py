"""What cannot be submitted is refused before anything is written; this machine runs what can (Slurm: tests/slurm)."""

from pathlib import Path

import pytest

from smoe_hpc.errors import ConfigError, DataError, LaunchError, RunError
from smoe_hpc.jobs.options import slurm_options
from smoe_hpc.launch import Job, submit


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


@pytest.mark.parametrize("store", ["nowhere", "nowhere/*.h5"])
def test_missing_data_are_refused(store: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at .*nowhere.*: set data.store"):
        submit("heat_smoe", data__store=store, cluster="local")
    assert list(tmp_path.iterdir()) == []


def test_no_slurm_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"slurm does not take the job: .*srun"):
        submit("heat_smoe", nodes=2, data__store=tmp_path)


def test_options_of_sbatch() -> None:
    options = slurm_options("x", 8, "gpu", None, 300, {"mem": "64G"})
    assert options["slurm_partition"] == "gpu"
    assert "slurm_account" not in options
    assert options["slurm_additional_parameters"] == {"requeue": True, "mem": "64G"}
    assert "SRUN_CPUS_PER_TASK=8" in options["slurm_setup"][0]
    assert "--export=ALL" in options["slurm_srun_args"]


def test_a_local_job_that_fails_says_why_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    job = submit("heat_smoe", data__store="empty", root=tmp_path / "runs", cluster="local", time=5)
    assert isinstance(job, Job)
    with pytest.raises(RunError, match=r"ended as FAILED: [^:.]*empty.*log is") as caught:
        job.result(timeout=100)
    assert "smoe_hpc.errors" not in str(caught.value)
    assert job.state == "FAILED"
    errors = job.logs()[1].read_text()
    assert [line for line in errors.splitlines() if "empty" in line and line.startswith("error: ")]
    assert "Traceback" not in errors
    with pytest.raises(LaunchError, match="no rank 1: it has 1"):
        job.log(1)


def test_an_error_that_is_not_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "h5py.py").write_text("raise OSError('libhdf5 is not there')")
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    job = submit("heat_smoe", data__store="data", root=tmp_path / "runs", cluster="local", time=5)
    with pytest.raises(RunError, match=r"ended as FAILED: OSError: libhdf5 is not there"):
        job.result(timeout=100)
    assert "Traceback" in job.log()
