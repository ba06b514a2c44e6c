"""Noting that somebody asked this process to stop, from the start of a command to its end.

A scheduler sends SIGUSR1 some minutes before the time is up, SIGTERM when it takes the nodes away, submitit sends SIGUSR2;
none of them at the same moment to every rank. So a signal is only noted here. Who works in steps asks :func:`asked` and
lets all ranks agree on a step (`smoe_hpc.training.signals`). This module imports nothing heavy: a signal that comes before
the handlers stand ends the process.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_noted: list[str] = []
_found: list[dict[int, Any]] = []  # handlers that each listening found, the outer one first


def asked() -> str:
    """Name of the first signal that asked this process to stop since `listening` began, or "" where none did."""
    return _noted[0] if _noted else ""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Note the signals instead of ending by them; may be nested, and what the outer one noted the inner one sees.

    Replaces the handlers that it finds (submitit's would save a checkpoint on rank 0 alone) and puts them back. Outside of
    the main thread it does nothing: Python allows handlers there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _found.append({number: signal.signal(number, _note) for number in SIGNALS})
    try:
        yield
    finally:
        for number, handler in _found.pop().items():
            signal.signal(number, handler)
        if not _found:
            _noted.clear()


def obey_sigterm() -> None:
    """From here on nothing is left to save: SIGTERM does again what it did before anybody listened."""
    if _found and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _found[0][signal.SIGTERM])


def ignore_until_exit() -> None:
    """This process is leaving, and its job is being taken down: what comes now must not cut off its last words."""
    for found in _found:
        found.update(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)
