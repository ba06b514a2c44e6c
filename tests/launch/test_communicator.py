"""A data job's processes put their parts together, whoever started them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoe_hpc.launch.rendezvous import free_port
from tests.launch.test_rendezvous import start

WORKER = str(Path(__file__).with_name("communicator_worker.py"))
MPIRUN = ("mpirun", "--oversubscribe", "-n", "3", sys.executable, WORKER)
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def assert_gathered(done: subprocess.CompletedProcess[str], world: int, torch: bool) -> None:
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["rank"] for one in told) == list(range(world))
    for one in told:
        assert (one["world"], one["rows"], one["torch"]) == (world, list(range(7)), torch)


def test_alone() -> None:
    assert_gathered(start(sys.executable, WORKER), 1, torch=False)


@pytest.mark.mpi
def test_mpirun_needs_no_torch() -> None:
    assert_gathered(start(*MPIRUN, **AS_ROOT), 3, torch=False)


def test_torchrun() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    assert_gathered(start(*torchrun, WORKER), 2, torch=True)


@pytest.mark.mpi
def test_a_rank_that_fails_takes_the_others_along() -> None:
    begin = time.monotonic()
    done = start(*MPIRUN, "fail", **AS_ROOT)
    assert done.returncode == 3, done.stderr
    assert time.monotonic() - begin < 60
