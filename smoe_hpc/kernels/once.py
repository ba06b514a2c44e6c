"""A file that many processes want and one makes: the others wait for it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from smoe_hpc.errors import RunError

_PATIENCE = 1200.0  # seconds to wait for another process before making the file oneself
_LOOK_EVERY = 0.1  # seconds
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that cannot lock


def make_once(path: Path, make: Callable[[Path, Path], None], announce: Callable[[], None]) -> Path:
    """The file, made if it is not there; it is there whole or not at all.

    The lock is the kernel's, so that a process which dies lets go of it. Where the file system has no locks, or its
    holder takes longer than anyone would, every process makes the file for itself; the last one's stays.

    Args:
        path: the file; its folder is made.
        make: called with an empty folder to work in and the path to write to.
        announce: called before ``make``, by the process that makes it.

    Raises:
        RunError: what ``make`` raised, here or in the process that was waited for.
        OSError: the folder cannot be written.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    complaint = path.with_suffix(".failed")
    with _lock(path.with_suffix(".lock"), path) as waited:
        if path.exists():
            return path
        if waited and complaint.exists():
            raise RunError(complaint.read_text())
        complaint.unlink(missing_ok=True)
        announce()
        work = Path(tempfile.mkdtemp(prefix="making-", dir=path.parent))
        try:
            make(work, work / path.name)
            os.replace(work / path.name, path)
        except RunError as error:
            complaint.write_text(str(error))
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


@contextlib.contextmanager
def _lock(path: Path, wanted: Path) -> Iterator[bool]:
    """Hold the lock, or see ``wanted`` come into being; yields whether another process had it in between."""
    waited = False
    deadline = time.monotonic() + _PATIENCE
    with path.open("a") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    break
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                waited = True
                if wanted.exists():
                    break
                time.sleep(_LOOK_EVERY)
            else:
                _clear_leftovers(path.parent)
                break
        yield waited


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left, a day after."""
    for left in folder.glob("making-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
