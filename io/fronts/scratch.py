"""A folder of this process's own among temporary files, and what processes that were killed have left of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def make_folder(prefix: str) -> tuple[Path, Callable[[], None]]:
    """A new folder ``<prefix><pid>-...``, and what removes it; folders of this user's dead processes are removed.

    A folder whose process was killed is known by its process id, and by a lock that went with the process: a process of
    another container that shares the temporary files has an id that means nothing here.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        with contextlib.suppress(OSError):  # somebody else removes it at this moment
            if left.stat().st_uid == os.getuid() and _is_abandoned(left, left.name.removeprefix(prefix).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
    lock = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks, on which nobody else gets one either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)

    return folder, remove


def _is_abandoned(folder: Path, pid: str) -> bool:
    """Whether no process of that id lives here and nobody holds the folder's lock. OSError where it cannot be locked."""
    if not pid.isdigit() or Path("/proc", pid).exists():
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(handle)
