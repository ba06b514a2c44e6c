"""Files that are kept open for the next read: as many as the process can spare, whatever number of files there is.

A folder may hold a file a day, and a process open 1,024 files or fewer. So a reader takes a file from here and gives it
back; of the idle ones, those used longest ago are closed. One in use is never closed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import resource
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import h5py

from smoe_hpc.io.access.faults import UnreadableError

_OTHERS = 64  # descriptors left to the rest of the process: libraries, sockets, logs
_LEAST, _MOST = 8, 4096
_MOST_HDF5 = 128  # each holds memory as well
T = TypeVar("T")


class Opened(Generic[T]):
    """An open file, and how many read from it."""

    __slots__ = ("handle", "kept", "users")

    def __init__(self, handle: T) -> None:
        self.handle = handle
        self.users = 1
        self.kept = True


class OpenFiles(Generic[T]):
    """At most ``limit`` idle open files; safe from many threads.

    Args:
        limit: of files.
        close: closes one.
        outlives_fork: whether a child process may use what its parent has opened.
    """

    def __init__(self, limit: int, close: Callable[[T], None], *, outlives_fork: bool) -> None:
        self.limit = limit
        self._close, self._outlives_fork = close, outlives_fork
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[object, Opened[T]] = collections.OrderedDict()  # by their last use
        self._dropped: collections.deque[object] = collections.deque()
        self._inherited: list[Opened[T]] = []
        os.register_at_fork(after_in_child=self._after_fork)

    def take(self, key: object, open_file: Callable[[], T]) -> Opened[T]:
        """A file, opened if it is not; to be given back.

        Args:
            key: of the file.
            open_file: opens it.

        Raises:
            Exception: what ``open_file`` raises. For want of descriptors it is called again with idle files closed.
        """
        with self._lock:
            found = self._files.get(key)
            if found is not None:
                found.users += 1
                self._files.move_to_end(key)
                return found
        handle = with_room(open_file)  # meanwhile others go on reading
        surplus = []
        with self._lock:
            found = self._files.get(key)
            if found is None:
                found = self._files[key] = Opened(handle)
                surplus = self._surplus(self.limit)
            else:  # another thread was faster
                found.users += 1
                surplus = [handle]
        self._close_all(surplus)
        return found

    def give(self, opened: Opened[T]) -> None:
        """Say that a file that was taken is not used any more."""
        with self._lock:
            opened.users -= 1
            unwanted = not opened.kept and opened.users == 0
        if unwanted:
            self._close_all([opened.handle])
        if self._dropped:
            self._clear_dropped()

    def drop(self, key: object) -> None:
        """Close a file, now or when it is given back.

        Nothing is waited for: objects that are collected call this, wherever their thread is at that moment.
        """
        self._dropped.append(key)
        self._clear_dropped()

    def close_idle(self) -> bool:
        """Close idle files, and keep half as many from now on; False where there was nothing."""
        with self._lock:
            self.limit = max(self.limit // 2, 1)
            surplus = self._surplus(0)
        self._close_all(surplus)
        return bool(surplus)

    def __len__(self) -> int:
        return len(self._files)

    def _surplus(self, limit: int) -> list[T]:
        """Take idle files out until at most ``limit`` are there."""
        found = []
        over = len(self._files) - limit
        if over > 0:
            idle = (key for key, opened in self._files.items() if not opened.users)
            for key in [key for key, _ in zip(idle, range(over), strict=False)]:
                opened = self._files.pop(key)
                opened.kept = False
                found.append(opened.handle)
        return found

    def _clear_dropped(self) -> None:
        while self._dropped and self._lock.acquire(blocking=False):  # or else who has the lock does it when giving back
            unwanted = []
            try:
                opened = self._files.pop(self._dropped.popleft(), None)
                if opened is not None:
                    opened.kept = False
                    unwanted = [] if opened.users else [opened.handle]
            finally:
                self._lock.release()
            self._close_all(unwanted)

    def _close_all(self, handles: list[T]) -> None:
        for handle in handles:
            with contextlib.suppress(OSError, RuntimeError):
                self._close(handle)

    def _after_fork(self) -> None:
        """Of all threads only this one is left, which was not reading."""
        self._lock = threading.Lock()
        if self._outlives_fork:
            for opened in self._files.values():
                opened.users = 0
        else:
            self._inherited += self._files.values()
            self._files.clear()


def with_room(open_file: Callable[[], T]) -> T:
    """What a function opens; if descriptors are wanting, once more with all idle files closed.

    Raises:
        Exception: what it raises.
    """
    try:
        return open_file()
    except UnreadableError as error:
        if not error.for_want_of_descriptors or not any([DESCRIPTORS.close_idle(), HDF5.close_idle()]):
            raise
    return open_file()


def spare(soft: int) -> int:
    """How many files may be kept open where a process may open ``soft`` (-1: any number).

    >>> [spare(soft) for soft in (40, 100, 1024, 1 << 20, -1)]
    [8, 36, 512, 4096, 4096]
    """
    return _MOST if soft < 0 else max(_LEAST, min(soft // 2, soft - _OTHERS, _MOST))


_spare = spare(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
HDF5: OpenFiles[h5py.File] = OpenFiles(min(_spare // 4, _MOST_HDF5), h5py.File.close, outlives_fork=False)
DESCRIPTORS: OpenFiles[int] = OpenFiles(_spare - HDF5.limit, os.close, outlives_fork=True)
