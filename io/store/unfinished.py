"""The file that a store is written to until it is whole: one writer at a time."""

from __future__ import annotations

import os
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.files.locks import Lock, try_lock


def hold(unfinished: Path, path: Path) -> int:
    """Make a file, or take over what a killed writer left, and keep other writers away, where the file system can.

    HDF5's own lock fails where there are none, and goes before the file has got its name.

    Args:
        unfinished: the file.
        path: what it is to be called in the end.

    Returns:
        A descriptor; closing it lets go.

    Raises:
        DataError: another process writes to it.
        OSError: it cannot be made.
    """
    while True:
        handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock = try_lock(handle, unfinished)
        except OSError:
            os.close(handle)
            raise
        if lock is Lock.NONE or (lock is Lock.TAKEN and _is_at(handle, unfinished)):
            return handle
        os.close(handle)
        if lock is Lock.HELD:
            raise DataError(f"{path} is being written by another process; wait for it, or choose another name")


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is what has a name now; another writer may just have finished it, or dropped it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
