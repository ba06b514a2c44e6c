"""A folder of this process's own among temporary files, and what processes that were killed have left of theirs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from smoe_hpc.files.locks import Lock, try_lock


def make_folder(prefix: str) -> tuple[Path, Callable[[], None]]:
    """A new folder ``<prefix><pid>-...``, and what removes it; folders of this user's dead processes are removed.

    A folder whose process was killed is known by its process id, and by a lock that went with the process: a process of
    another container that shares the temporary files has an id that means nothing here.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        with contextlib.suppress(OSError):  # another process removes it at this moment
            if left.lstat().st_uid == os.getuid() and _is_abandoned(left, left.name.removeprefix(prefix).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # where folders cannot be locked, none is ever taken for abandoned
        try_lock(lock, folder, warn=False)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)

    return folder, remove


def _is_abandoned(folder: Path, pid: str) -> bool:
    """Whether no process of that id runs here and the folder's lock is free; False where there are no locks."""
    if not pid.isdigit() or Path("/proc", pid).exists():
        return False
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return try_lock(handle, folder, warn=False) is Lock.TAKEN
    finally:
        os.close(handle)
