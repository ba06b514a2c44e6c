"""Nothing of a job listens where others than its own hosts could call."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.interfaces import interface_towards, listening_socket, loopback_interface
from smoe_hpc.launch.rendezvous import free_port

from .test_rendezvous import WORKER, start

LOOPBACK = "127.0.0.1"


def test_a_process_alone_has_no_port_beyond_loopback() -> None:
    done = start(sys.executable, WORKER)
    assert done.returncode == 0, done.stderr
    (told,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert set(told["listening"]) <= {LOOPBACK}


@pytest.mark.mpi
def test_processes_of_one_host_listen_on_loopback() -> None:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    given = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}  # else MPI itself is started in them
    done = start("mpirun", "--oversubscribe", "-n", "2", sys.executable, WORKER, **as_root, **given)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 2
    assert {address for one in told for address in one["listening"]} == {LOOPBACK}


def test_a_socket_listens_on_the_given_address_alone() -> None:
    with listening_socket("localhost", 0, several_hosts=False) as made:
        assert made.getsockname()[0] == LOOPBACK
        with pytest.raises(LaunchError, match=r"cannot listen on 127\.0\.0\.1:\d+ \(Address already in use\); set MASTER_PORT"):
            listening_socket(LOOPBACK, made.getsockname()[1], several_hosts=False)


def test_a_name_that_is_loopback_here_serves_no_other_host(caplog: pytest.LogCaptureFixture) -> None:
    with listening_socket("localhost", 0, several_hosts=True) as made:
        assert made.getsockname()[0] == "0.0.0.0"
    assert "set MASTER_ADDR to the address of one of them" in caplog.text


def test_a_name_without_address_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=no\.such\.host\.invalid has no address"):
        listening_socket("no.such.host.invalid", 0, several_hosts=False)


def test_interfaces() -> None:
    assert loopback_interface() in [name for _, name in socket.if_nameindex()]
    assert interface_towards(LOOPBACK) == loopback_interface()
    assert interface_towards("no.such.host.invalid") is None
