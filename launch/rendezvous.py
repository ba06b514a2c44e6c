"""Where do the processes of a job meet?

:func:`find_ranks` says who this process is. :func:`init_distributed` settles what its launcher left open (an address
and a free port), starts torch's process group (`meeting.py`) and DeepSpeed on it and checks them; :func:`shutdown` ends it. How
long anybody waits for anybody stands in `patience.py`, on which addresses they listen in `interfaces.py`, how a process that
is missing is found in `pulse.py`.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from smoe_hpc import compat
from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.job import node_address
from smoe_hpc.launch.meeting import gloo_interface, on_one_host, start_group
from smoe_hpc.launch.mpi import mpi_world
from smoe_hpc.launch.patience import HEARTBEAT, Patience, patience
from smoe_hpc.launch.pulse import Pulse
from smoe_hpc.launch.ranks import LOOPBACK, PORTS, Ranks, device_index, find_ranks

_running: Ranks | None = None
_pulse: Pulse | None = None
_before: dict[str, str | None] = {}


def init_distributed(device: str | torch.device) -> Ranks:
    """Start torch's process group for this process; collective over all processes of the job.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (and DS_ACCELERATOR on a CPU) for DeepSpeed and for
    child processes; :func:`shutdown` takes them back. On GPUs it makes this process's GPU the current one. Called again
    it answers the same. How long it waits, here and in collectives, SMOE_TIMEOUT says.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL).

    Raises:
        LaunchError: processes that do not fit together or do not come, or too few GPUs.
    """
    global _running
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise LaunchError(f"device {device!s} is neither cpu nor cuda; choose one of them")
    if _running is not None:
        return _running
    ranks = _settle_address(find_ranks(os.environ))
    try:
        _start_group(ranks, kind)
    except BaseException:
        shutdown()
        raise
    _running = ranks
    return ranks


def shutdown() -> None:
    """End the process group, and take back the variables that :func:`init_distributed` set.

    To be called on every rank before it exits: without it gloo's threads outlive the interpreter and the process may
    end in SIGABRT. Does nothing where no group runs.
    """
    global _running, _pulse
    if _pulse is not None:
        _pulse.end()
        _pulse = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    compat.forget_deepspeed_groups()
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    _running = None


def own_pulse() -> Pulse | None:
    """This process's signs of life; None where it is alone, or where somebody else started its process group."""
    return _pulse


def same_time_out() -> None:
    """Give every process group of this process, DeepSpeed's too, the time-out of SMOE_TIMEOUT."""
    if _pulse is None:
        return
    for group in compat.process_groups():
        nccl = "nccl" in str(dist.get_backend(group))
        compat.set_time_out(group, timedelta(seconds=_pulse.allowed.nccl if nccl else _pulse.allowed.wait))


def gloo_group(ranks: Ranks) -> tuple[Any, Callable[[], None]]:
    """A gloo group over all processes for a job that is no training, and what leaves it; collective. No DeepSpeed.

    A process group that runs already is used, and left running.

    Args:
        ranks: this process.

    Raises:
        LaunchError: processes that do not fit together, or do not come.
    """
    allowed = patience(os.environ)
    ours = not dist.is_initialized()
    if ours:
        ranks = _settle_address(ranks)
        try:
            _set_variables(
                RANK=ranks.rank, WORLD_SIZE=ranks.world, MASTER_ADDR=ranks.master_addr, MASTER_PORT=ranks.master_port
            )
            _init_group("gloo", ranks, allowed)
        except BaseException:
            shutdown()
            raise
    _check_world(ranks)
    # somebody else's processes give no signs of life: a rank may there have more to do than another
    group = dist.new_group(backend="gloo", timeout=allowed.timeout if _pulse is not None else timedelta(days=1))
    return group, shutdown if ours else lambda: dist.destroy_process_group(group)


def _settle_address(ranks: Ranks) -> Ranks:
    """Fill in the address that the launcher left open; collective where an MPI started the processes."""
    if ranks.master_addr is not None and ranks.master_port is not None:
        if ranks.launcher != "slurm" or os.environ.get("MASTER_ADDR"):
            return ranks
        return replace(ranks, master_addr=LOOPBACK if on_one_host(ranks) else _reachable(ranks.master_addr))
    if ranks.world == 1:
        # nobody else has to know the port: the system chooses a free one at the moment of listening
        return replace(ranks, master_addr=ranks.master_addr or LOOPBACK, master_port=ranks.master_port or 0)
    own = LOOPBACK if on_one_host(ranks) else socket.gethostname()
    addr, port = _broadcast_by_mpi(ranks, (own, free_port()))
    return replace(ranks, master_addr=ranks.master_addr or addr, master_port=ranks.master_port or port)


def _reachable(node: str) -> str:
    """Address of a Slurm node, whose name need not be that of a host.

    Raises:
        LaunchError: neither the system nor Slurm knows one.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        address = node_address(node)
    if address is None:
        raise LaunchError(f"node {node} of rank 0 has no address that this host can find; set MASTER_ADDR to its address")
    return address


def _start_group(ranks: Ranks, kind: str) -> None:
    allowed = patience(os.environ)
    local = ranks.local_rank
    if kind == "cuda":
        bound = ranks.launcher == "slurm" or "CUDA_VISIBLE_DEVICES" in os.environ
        local = device_index(ranks, torch.cuda.device_count(), bound)
        torch.cuda.set_device(local)
    _set_variables(
        RANK=ranks.rank,
        WORLD_SIZE=ranks.world,
        LOCAL_RANK=local,  # DeepSpeed takes it for the number of the GPU
        MASTER_ADDR=ranks.master_addr,
        MASTER_PORT=ranks.master_port,
        **({"DS_ACCELERATOR": "cpu"} if kind == "cpu" else {}),
    )
    deepspeed = _import_deepspeed(kind)
    backend = "gloo" if kind == "cpu" else "nccl"
    if not dist.is_initialized():
        _init_group(backend, ranks, allowed)
    _check_world(ranks)
    # takes up torch's group
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=allowed.timeout)


def _init_group(backend: str, ranks: Ranks, allowed: Patience) -> None:
    global _pulse
    interface = None if "GLOO_SOCKET_IFNAME" in os.environ else gloo_interface(ranks)
    if interface is not None:
        _set_variables(GLOO_SOCKET_IFNAME=interface)
    if ranks.world > 1:
        _set_variables(**{HEARTBEAT: int(allowed.heartbeat)})
    _pulse = start_group(backend, ranks, allowed)


def _check_world(ranks: Ranks) -> None:
    if dist.get_world_size() != ranks.world or dist.get_rank() != ranks.rank:
        raise LaunchError(
            f"{ranks.launcher} says rank {ranks.rank} of {ranks.world}, torch rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; a process group was started before, let init_distributed start it"
        )


def free_port() -> int:
    """A TCP port that nothing on this host uses at the moment.

    It is none that the system gives to outgoing connections, so that only another server can take it before it is used.

    Raises:
        LaunchError: every port of the range is in use.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # jobs with one seed must not meet on one port
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on this host; set MASTER_PORT")


def _broadcast_by_mpi(ranks: Ranks, value: tuple[str, int]) -> tuple[str, int]:
    """Rank 0's value, on every rank; collective over the MPI's world."""
    foreign = "mpi4py.MPI" in sys.modules  # somebody else's MPI is left running
    world = mpi_world(ranks)
    agreed: tuple[str, int] = world.bcast(value, root=0)
    if not foreign:
        from mpi4py import MPI

        # A rank that fails must not wait in MPI_Finalize for ranks that wait for it in a collective of torch
        MPI.Finalize()
    return agreed


def _set_variables(**values: object) -> None:
    for name, value in values.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = str(value)


def _import_deepspeed(kind: str):  # type: ignore[no-untyped-def]  # the module, which has no types
    """DeepSpeed, silent but for warnings; takes seconds, hence not at the top of the file."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    compat.leave_out_shared_memory_reduce()
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != kind:
        raise LaunchError(
            f"DeepSpeed runs on {chosen} in this process, but training on {kind}; set DS_ACCELERATOR={kind} before the start"
        )
    return deepspeed
