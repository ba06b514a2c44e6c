"""Processes that srun starts, and the Slurm of one machine that starts them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smoe_hpc.io.synthetic.heat import make_heat
from smoe_hpc.launch import submit
from smoe_hpc.launch.job import job_state, node_address
from tests.slurm.conftest import LOCAL_SLURM, ROOT, Slurm, clean_environment

pytestmark = pytest.mark.slurm
LAUNCH = ROOT / "tests" / "launch"


def ranks(text: str) -> list[dict[str, object]]:
    return sorted((json.loads(line) for line in text.splitlines() if line.startswith("{")), key=lambda one: one["rank"])


def test_srun_without_an_mpi_is_one_world(slurm: Slurm) -> None:
    """Two nodes whose names are no host names; Slurm is asked for their address."""
    told = ranks(slurm.run("srun", "-N2", "--mpi=none", sys.executable, str(LAUNCH / "rendezvous_worker.py")))
    assert [one["rank"] for one in told] == [0, 1]
    assert {(one["world"], one["local_world"], one["launcher"], one["total"]) for one in told} == {(2, 1, "slurm", 3.0)}
    assert len({(one["master_addr"], one["master_port"]) for one in told}) == 1


def test_a_data_job_under_srun(slurm: Slurm) -> None:
    told = ranks(
        slurm.run("srun", "-N2", "-n3", "--overcommit", "--mpi=none", sys.executable, str(LAUNCH / "communicator_worker.py"))
    )
    assert [(one["rank"], one["world"], one["rows"]) for one in told] == [(rank, 3, list(range(7))) for rank in range(3)]


@pytest.mark.parametrize("export", ["NONE", "HOME,LANG"])
def test_every_task_gets_the_environment_whatever_sbatch_exports(
    slurm: Slurm, environment_script: str, tmp_path: Path, export: str
) -> None:
    """Many sites' profiles set SBATCH_EXPORT; srun would hand that on to the tasks, which then find no python."""
    program = "import os; print(os.environ['READ_IN_THE_JOB'], os.environ['SLURM_PROCID'])"
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2\n. {environment_script}\n. {ROOT}/slurm/common.sh\n"
        f'export READ_IN_THE_JOB=here\nstep try python -c "{program}"\n'
    )
    job = slurm.sbatch(script, tmp_path, f"--export={export}")
    about = slurm.wait(job, ("COMPLETED", "FAILED"))
    log = (tmp_path / "log").read_text()
    assert about["JobState"] == "COMPLETED", log
    assert sorted(log.splitlines()) == ["here 0", "here 1"]


def test_a_submitted_run_trains_whatever_sbatch_exports(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in a folder whose name YAML and shells would cut, submitted as in a site whose profile exports nothing."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm.conf)
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    store = tmp_path / "heat #1"
    make_heat(store, (4, 2, 2), (12, 12), steps=10)
    short = {"training.batch": 8, "training.max_steps": 2, "training.validate_every": 2, "run.pictures": False}
    job = submit("heat_quickstart", {"data.store": store, **short}, root=tmp_path / "runs #1", time=10)
    assert set(job.result(timeout=120)) == {"validation", "test"}
    assert job.run_dir == tmp_path / "runs #1" / "heat_quickstart"
    assert "validation within_1pct" in job.logs()[1].read_text(), "where `submit` says that progress goes"


def test_slurm_is_asked(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.conf)
    assert node_address("node2") == "127.0.0.1"
    assert node_address("node9") is None
    waiting = slurm.run("sbatch", "--parsable", "--hold", "--wrap=true", cwd=tmp_path)
    assert job_state(waiting) == "PENDING"
    slurm.run("scancel", waiting)
    assert job_state(waiting) == "CANCELLED"
    assert job_state("999999") is None


def test_up_again_changes_nothing_and_a_cluster_is_left_alone(slurm: Slurm) -> None:
    folder = Path(slurm.conf).parent
    before = (folder / "slurmctld.pid").read_text()

    def script(verb: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = clean_environment(**variables)
        return subprocess.run(["bash", str(LOCAL_SLURM), verb], env=environ, capture_output=True, text=True, timeout=120)

    again = script("up", SMOE_SLURM_DIR=str(folder), SLURM_CONF=slurm.conf, SMOE_SLURM_FORCE="1")
    assert again.stdout == f"export SLURM_CONF={slurm.conf}\n", again.stderr
    assert (folder / "slurmctld.pid").read_text() == before
    status = script("status", SMOE_SLURM_DIR=str(folder))
    assert "node2" in status.stdout
    assert script("status", SMOE_SLURM_DIR=str(folder / "none")).returncode == 3
    refused = script("up", SMOE_SLURM_DIR=str(folder / "none"), SLURM_CONF="/etc/somewhere/slurm.conf")
    assert refused.returncode == 2
    assert "belongs to a Slurm cluster (/etc/somewhere/slurm.conf)" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_down_stops_the_slurm_of_this_shell(slurm: Slurm) -> None:
    """SLURM_CONF, which `up` printed, says which one; that of the tests goes on."""
    folder = Path(tempfile.mkdtemp(prefix="smoe-slurm-"))

    def script(verb: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = clean_environment(TMPDIR=str(folder / "elsewhere"), **variables)
        return subprocess.run(["bash", str(LOCAL_SLURM), verb], env=environ, capture_output=True, text=True, timeout=120)

    try:
        up = script("up", SMOE_SLURM_DIR=str(folder), SMOE_SLURM_FORCE="1")
        assert up.returncode == 0, up.stderr
        assert f"nodes of {os.cpu_count()} cores" in up.stderr, "whatever OMP_NUM_THREADS says"
        conf = up.stdout.strip().removeprefix("export SLURM_CONF=")
        assert "nothing runs in" in script("down").stderr, "a shell that knows nothing of it"
        assert script("status", SLURM_CONF=conf).returncode == 0
        down = script("down", SLURM_CONF=conf)
        assert f"Slurm of {folder} is stopped" in down.stderr
        assert script("status", SLURM_CONF=conf).returncode == 3
        assert slurm.run("sinfo", "--noheader")
    finally:
        script("down", SMOE_SLURM_DIR=str(folder))
        shutil.rmtree(folder)
