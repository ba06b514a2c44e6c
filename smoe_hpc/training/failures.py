"""How the failure of one rank reaches the others.

A rank that fails on its own (a damaged sample, too little memory) never comes to the next collective, and the others wait
in it. So it posts its message in the store through which the processes met, and leaves; its connections close, the others
fall out of their collective, read the message and end with it, in one line. A rank that can post nothing (stopped, killed,
its node gone) is found by its signs of life: the first to notice looks for the missing rank, and the others read what it
found. No step waits for this.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from smoe_hpc import compat
from smoe_hpc.errors import RunError, SmoeError
from smoe_hpc.launch import rendezvous
from smoe_hpc.launch.pulse import Pulse, StoreSilent
from smoe_hpc.training.processes import Processes
from smoe_hpc.training.signals import RunInterrupted

T = TypeVar("T")
_LINGER = 5.0  # seconds that rank 0, which may hold the store, waits for the others to read it
_WAIT = 3.0  # seconds to wait for a message that may still arrive
_BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset")
_LATE = ("Timed out", "timed out", "Timeout", "timeout")
_FINDING = -1  # in place of a rank: the message says which rank is missing, and is not that rank's own
_times = itertools.count()  # every rank enters equally often: each entry has keys of its own
_inside = False


@contextlib.contextmanager
def shared_failures(processes: Processes) -> Iterator[None]:
    """Let an error of one rank end all of them. Collective; after an error a process should end. May be nested.

    Raises:
        RunError: another rank failed, with that rank's message; or it did not come to a collective, or ended without a
            message: it names the rank, the step and the collective.
    """
    global _inside
    if processes.world == 1 or _inside:
        yield
        return
    key = f"smoe_hpc/failure/{next(_times)}"
    _inside = True
    try:
        yield
    except RunInterrupted:  # all ranks agreed on it
        raise
    except Exception as error:
        board = _Board(processes, key)
        cause = board.cause_elsewhere(error)
        if cause is None:
            board.post(f"{processes.rank} {_in_words(error)}")
        board.leave()
        if cause is None:
            raise
        raise RunError(cause) from None
    finally:
        _inside = False


class _Board:
    """The messages of failing processes, in the store that all of them share."""

    def __init__(self, processes: Processes, key: str) -> None:
        self._processes, self._key = processes, key
        self._pulse: Pulse | None = processes.pulse

    def cause_elsewhere(self, error: Exception) -> str | None:
        """The failure of another rank that led to this error; None where the error is this rank's own."""
        broken = _broken(error)
        posted = self._posted(_WAIT if broken else 0.0)
        if posted is None and broken:
            posted = (_FINDING, self._find_missing(error))
        if posted is None:
            return None
        number, message = posted
        if number == _FINDING:
            return message if broken else None
        if number == self._processes.rank or message == _in_words(error):  # all ranks found the same
            return None
        return f"rank {number} failed: {message}"

    def post(self, words: str) -> None:
        """Write a message for the others, unless there is one."""
        self._query(lambda store: store.compare_set(self._key, "", words))

    def leave(self) -> None:
        """Free the others: NCCL's ranks at once, gloo's when this process ends and its connections close."""
        key = f"{self._key}/left"
        self._query(lambda store: store.add(key, 1))
        if self._processes.device.type == "cuda":
            compat.abort_process_groups()
        if self._processes.first and self._pulse is not None:
            atexit.register(_linger, self._pulse, key, self._processes.world)

    def _find_missing(self, error: Exception) -> str:
        """Which rank is missing, in words; the first rank to look finds out, the others read it."""
        pulse = self._pulse
        if pulse is None:
            return "another process of this run ended or does not answer"
        ended = not any(word in words for words in _chain(error) for word in _LATE)
        seekers = self._query(lambda store: store.add(f"{self._key}/seekers", 1))
        if seekers is not None and seekers > 1:
            posted = self._posted(3 * _WAIT + 6 * pulse.allowed.beat)
            if posted is not None:
                return posted[1] if posted[0] == _FINDING else f"rank {posted[0]} failed: {posted[1]}"
        found = f"{pulse.missing(ended)}; the same command goes on from the last checkpoint"
        self.post(f"{_FINDING} {found}")
        return found

    def _posted(self, seconds: float) -> tuple[int, str] | None:
        """(rank, message) that was posted, or None if nothing was by then."""
        deadline = time.monotonic() + seconds
        while True:
            there = self._query(lambda store: store.check([self._key]))
            if there:
                words = self._query(lambda store: store.get(self._key).decode())
                number, _, message = (words or "").partition(" ")
                return (int(number), message) if words else None
            if there is None or time.monotonic() >= deadline:  # None: the store has gone with its process
                return None
            time.sleep(0.05)

    def _query(self, question: Callable[[Any], T]) -> T | None:
        if self._pulse is None:
            with contextlib.suppress(RuntimeError):
                return question(compat.default_store())
            return None
        try:
            return self._pulse.query(question)
        except StoreSilent:
            return None


def _chain(error: BaseException | None) -> Iterator[str]:
    """Messages of an error and of those that led to it."""
    while error is not None:
        yield str(error)
        error = error.__cause__


def _broken(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a connection to other processes."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN):
            return True
        error = error.__cause__
    return False


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, SmoeError) else f"{type(error).__name__}: {error}"


def _linger(pulse: Pulse, key: str, world: int) -> None:
    """Close the connections, but keep the store, which may live in this process, until the others have read it."""
    rendezvous.shutdown()
    gc.collect()  # connections close with the last reference to their group
    deadline = time.monotonic() + _LINGER
    with contextlib.suppress(StoreSilent):
        while pulse.query(lambda store: store.add(key, 0)) < world and time.monotonic() < deadline:
            time.sleep(0.05)
