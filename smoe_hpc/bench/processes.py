"""What a process and its children cost: processor time, and memory as it goes.

Memory is counted as Linux's PSS, in which a page that several processes share is shared out among them, so that the
buffers between a loader and its workers count once.
"""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from types import TracebackType

_PROC = Path("/proc")


def processor_seconds() -> float:
    """Processor time of this process and of its children, living ones too."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    tick = os.sysconf("SC_CLK_TCK")
    living = sum(_times(pid) for pid in descendants(os.getpid())) / tick
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + living


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], list(children.get(pid, ()))
    while waiting:
        child = waiting.pop()
        found.append(child)
        waiting += children.get(child, ())
    return found


def memory_bytes(pid: int) -> int:
    """PSS of one process; 0 when it has ended."""
    try:
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def tree_memory() -> int:
    """PSS of this process and of all that it started."""
    pid = os.getpid()
    return memory_bytes(pid) + sum(memory_bytes(child) for child in descendants(pid))


class MemoryWatch:
    """Largest memory of this process and of its children while the context lasts, looked at a few times a second."""

    def __init__(self, every: float = 0.25) -> None:
        self.start = self.peak = 0
        self._every, self._stop, self._lock = every, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="smoe-memory-watch", daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def look(self) -> int:
        """Look now too; the largest memory so far."""
        found = tree_memory()
        with self._lock:  # the thread looks too
            self.peak = max(self.peak, found)
        return self.peak

    def __enter__(self) -> MemoryWatch:
        self.start = self.peak = tree_memory()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look()


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name: state, parent, ..."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _times(pid: int) -> int:
    """Clock ticks of a process and of its children that have ended and were waited for."""
    return sum(int(ticks) for ticks in _stat(pid)[11:15])
