"""Processes that really meet: alone, by torchrun and by mpirun."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch import rendezvous
from smoe_hpc.launch.ranks import PORTS
from smoe_hpc.launch.rendezvous import free_port, init_distributed

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = str(Path(__file__).with_name("rendezvous_worker.py"))
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC_")


def start(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run to its end, in an environment without any launcher's variables."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    environ.update(OMP_NUM_THREADS="1", **variables)
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)


def mpirun(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return start("mpirun", "--oversubscribe", "-n", "2", sys.executable, WORKER, *arguments, **as_root, **variables)


def assert_met(done: subprocess.CompletedProcess[str], launcher: str, world: int) -> None:
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == world, done.stdout
    assert sorted(rank["rank"] for rank in ranks) == list(range(world))
    assert {(rank["world"], rank["launcher"]) for rank in ranks} == {(world, launcher)}
    assert launcher == "single" or {rank["total"] for rank in ranks} == {world * (world + 1) / 2}
    assert len({(rank["master_addr"], rank["master_port"]) for rank in ranks}) == 1
    assert "deepspeed_shm_comm" not in done.stdout + done.stderr, "nothing is compiled for a start on the CPU"


def test_alone_and_again_after_shutdown() -> None:
    done = start(sys.executable, WORKER, "again")
    assert_met(done, "single", 1)
    assert len(done.stdout.splitlines()) == 1, "DeepSpeed is silent"


def test_alone_no_port_is_chosen_before_it_is_listened_on() -> None:
    """Two at once can so never meet; a child that finds the variables is alone as well."""
    done = start(sys.executable, WORKER)
    assert json.loads(done.stdout)["master_port"] == 0, done.stderr
    child = start(sys.executable, WORKER, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert json.loads(child.stdout)["master_port"] == 0, child.stderr


def test_a_chosen_port_is_free_and_not_for_outgoing_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        port = free_port()
        assert port in PORTS
        assert max(PORTS) < 32768
        taken.bind(("", port))
        taken.listen()
        monkeypatch.setattr(rendezvous, "PORTS", range(port, port + 1))
        with pytest.raises(LaunchError, match=f"no port from {port} to {port} is free"):
            free_port()


def test_torchrun() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = start(*torchrun, "--master_port", str(free_port()), WORKER)
    assert_met(done, "torchrun", 2)


@pytest.mark.mpi
def test_mpirun_agrees_on_a_port() -> None:
    done = mpirun()
    assert_met(done, "openmpi", 2)


@pytest.mark.mpi
def test_mpirun_with_an_address_of_the_users() -> None:
    port = str(free_port())
    done = mpirun(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert_met(done, "openmpi", 2)
    assert port in done.stdout


@pytest.mark.mpi
def test_a_rank_that_fails_ends_the_job() -> None:
    begin = time.monotonic()
    done = mpirun("fail")
    assert done.returncode != 0
    assert time.monotonic() - begin < 120, "the other rank does not wait for it"


@pytest.mark.mpi
def test_a_stale_rank_in_the_environment() -> None:
    done = mpirun(RANK="0", WORLD_SIZE="1")
    assert done.returncode != 0
    assert "unset RANK and WORLD_SIZE" in done.stderr


def test_processes_that_mpi_does_not_know_of() -> None:
    """mpirun of one MPI and mpi4py of another: every process would be a world of its own."""
    claim = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "0"), ("SIZE", "2"), ("LOCAL_RANK", "0"))}
    done = start(sys.executable, WORKER, **claim)
    assert done.returncode != 0
    assert "openmpi started 2 processes, but" in done.stderr
    assert "MASTER_ADDR and MASTER_PORT" in done.stderr


def test_other_devices_are_refused() -> None:
    with pytest.raises(LaunchError, match="meta is neither cpu nor cuda"):
        init_distributed("meta")
