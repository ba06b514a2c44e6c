"""Noting requests to stop this process, from the start of a command to its end.

A scheduler sends SIGUSR1 some minutes before the time is up, SIGTERM when it takes the nodes away, submitit sends SIGUSR2;
and none of them reaches every rank at the same moment. So a signal is only noted here; training calls :func:`stop_requested`
at each step and lets all ranks agree (`smoe_hpc.training.signals`). This module imports nothing heavy: a signal that comes
before the handlers are installed ends the process.
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
_found: list[dict[int, Any]] = []  # handlers that each `handle_stop_signals` found, the outer one first


def stop_requested() -> str:
    """Name of the first signal to stop since `handle_stop_signals` began, or "" if none came."""
    return _noted[0] if _noted else ""


@contextlib.contextmanager
def handle_stop_signals() -> Iterator[None]:
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


def restore_sigterm() -> None:
    """Nothing is left to save: SIGTERM does again what it did before `handle_stop_signals`."""
    if _found and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _found[0][signal.SIGTERM])


def ignore_until_exit() -> None:
    """Ignore further signals: this process is about to exit, and must be able to write its last message."""
    for found in _found:
        found.update(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)
