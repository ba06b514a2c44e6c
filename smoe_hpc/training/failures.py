"""What one rank's failure says to the others.

A rank that fails on its own (a damaged sample, memory that is not there) never comes to the next collective, and the
others wait in it. So it writes its message into the store through which the processes met, and leaves; its connections
close, the others then fall out of their collective, read the message and end with it, in one line. No step waits for this.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from smoe_hpc.errors import RunError, SmoeError
from smoe_hpc.launch import rendezvous
from smoe_hpc.training.processes import Processes
from smoe_hpc.training.signals import RunInterrupted

_LINGER = 5.0  # seconds that rank 0, which may hold the store, waits for the others to read it
_ASK = timedelta(seconds=3)  # for a message that may still be under way
_BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset")
_times = itertools.count()  # every rank enters equally often: each entry has keys of its own


@contextlib.contextmanager
def shared_failures(processes: Processes) -> Iterator[None]:
    """Let an error of one rank end all of them. Collective; after an error a process should end.

    Raises:
        RunError: another rank failed; it says which, and that rank's message.
    """
    if processes.world == 1:
        yield
        return
    store: Any = distributed_c10d._get_default_store()
    key = f"smoe_hpc/failure/{next(_times)}"
    try:
        yield
    except RunInterrupted:  # all ranks agreed on it
        raise
    except Exception as error:
        told = _told_by_others(store, key, error, processes.rank)
        if told is None:
            with contextlib.suppress(RuntimeError):  # the store may have gone with its process
                store.compare_set(key, "", f"{processes.rank} {_in_words(error)}")
        _leave(store, f"{key}/left", processes)
        if told is None:
            raise
        raise RunError(told) from None


def _told_by_others(store: Any, key: str, error: Exception, rank: int) -> str | None:
    """What another rank's failure has to do with this error; None where the error is this rank's own."""
    broken = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN)
    )
    try:
        if broken:
            store.wait([key], _ASK)
        elif not store.check([key]):
            return None
        number, _, message = store.get(key).decode().partition(" ")
    except RuntimeError:  # nobody wrote there, or the store has gone with its process
        return "another process of this run ended; its own message says why" if broken else None
    if int(number) == rank or message == _in_words(error):  # all ranks found the same
        return None
    return f"rank {number} failed: {message}"


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, SmoeError) else f"{type(error).__name__}: {error}"


def _leave(store: Any, key: str, processes: Processes) -> None:
    """Free the others: NCCL's ranks at once, gloo's when this process ends and its connections close."""
    with contextlib.suppress(RuntimeError):
        store.add(key, 1)
    if processes.device.type == "cuda":
        distributed_c10d._abort_process_group()
    if processes.first:
        atexit.register(_linger, store, key, processes.world)


def _linger(store: Any, key: str, world: int) -> None:
    """Close the connections, but keep the store, which may live in this process, until the others have read it."""
    rendezvous.shutdown()
    gc.collect()  # connections close with the last reference to their group
    deadline = time.monotonic() + _LINGER
    with contextlib.suppress(RuntimeError):
        while store.add(key, 0) < world and time.monotonic() < deadline:
            time.sleep(0.05)
