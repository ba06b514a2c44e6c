"""The store at which the processes of a job meet, and torch's process group on it.

Rank 0 serves the store, on the address by which the others reach it and on no other; a process alone needs no port at all.
"""

from __future__ import annotations

import itertools
import os
import time
from datetime import timedelta
from typing import Any

import torch

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.interfaces import interface_towards, listening_socket, loopback_interface
from smoe_hpc.launch.patience import VARIABLE, Patience
from smoe_hpc.launch.pulse import Pulse, StoreSilent
from smoe_hpc.launch.ranks import LOOPBACK, Ranks

_starts = itertools.count()  # every rank starts equally often: each start has names of its own in a launcher's store


def on_one_host(ranks: Ranks) -> bool:
    """Whether all processes are known to be on one host: whoever sets RANK by hand may leave LOCAL_WORLD_SIZE out."""
    known = ranks.launcher != "environment" or "LOCAL_WORLD_SIZE" in os.environ
    return ranks.local_world == ranks.world and known


def gloo_interface(ranks: Ranks) -> str | None:
    """The interface that gloo is to listen on; None where that is unknown, and gloo looks for itself."""
    if ranks.world == 1 or on_one_host(ranks):
        return loopback_interface()
    return interface_towards(str(ranks.master_addr))


def start_group(backend: str, ranks: Ranks, allowed: Patience) -> Pulse | None:
    """Start torch's process group (collective); the signs of life of its processes, None of one alone.

    Raises:
        LaunchError: a process does not come, or rank 0 cannot listen.
    """
    dist = torch.distributed
    if ranks.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=allowed.timeout)
        return None
    names = f"smoe_hpc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_starts)}"
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, which has told all its processes
    store = dist.PrefixStore(names, _join_store(ranks, allowed, serve=ranks.rank == 0 and not hosted))
    own = dist.PrefixStore(names, _join_store(ranks, allowed, serve=False))
    holder = "torchrun on the host of rank 0" if hosted else "rank 0"
    pulse = Pulse(own, store, ranks.rank, ranks.world, holder, allowed, watch=backend == "nccl")
    try:
        _wait_for_all(pulse, ranks, allowed)
        timeout = timedelta(seconds=allowed.nccl if backend == "nccl" else allowed.wait)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
    except BaseException:
        pulse.end()
        raise
    return pulse


def _join_store(ranks: Ranks, allowed: Patience, serve: bool) -> Any:
    """A connection to the store at which the processes meet; ``serve`` serves it from this process."""
    host, port = str(ranks.master_addr), int(ranks.master_port or 0)
    served: dict[str, Any] = {}
    if serve:
        several = not on_one_host(ranks) and host not in (LOOPBACK, "localhost")
        served = {"is_master": True, "master_listen_fd": listening_socket(host, port, several).detach()}
    try:
        return torch.distributed.TCPStore(host, port, ranks.world, timeout=allowed.timeout, wait_for_workers=False, **served)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world} did not find rank 0 at {host}:{port} within {allowed.wait:g} s "
            f"({_in_a_line(error)}); see why rank 0 did not start, or set MASTER_ADDR and MASTER_PORT"
        ) from None


def _wait_for_all(pulse: Pulse, ranks: Ranks, allowed: Patience) -> None:
    deadline = time.monotonic() + allowed.wait
    try:
        if pulse.query(lambda store: store.add("came", 1)) >= ranks.world:
            pulse.query(lambda store: store.set("all_came", ""))
        while not pulse.query(lambda store: store.check(["all_came"])):
            if time.monotonic() > deadline:
                late = pulse.query(lambda store: [r for r in range(ranks.world) if not store.check([f"pulse/{r}"])])
                named = ", ".join(map(str, late[:8]))
                raise LaunchError(
                    f"rank {named} of {ranks.world} did not come to the start within {allowed.wait:g} s; see why, or set "
                    f"{VARIABLE} to more seconds"
                )
            time.sleep(0.02)
    except StoreSilent:
        raise LaunchError("rank 0 ended while the processes met; its own message says why, if it has one") from None


def _in_a_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" Exception raised from")[0].strip()[:200]
