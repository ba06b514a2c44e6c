"""A file that many processes need and one of them makes while the others wait."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from smoe_hpc.errors import RunError
from smoe_hpc.files.locks import Lock, try_lock

_PATIENCE = 1200.0  # seconds to wait for another process before making the file oneself
_LOOK_EVERY = 0.1  # seconds


def make_once(
    path: Path,
    make: Callable[[Path, Path], None],
    announce: Callable[[], None],
    is_there: Callable[[Path], bool] = Path.exists,
    waits: Callable[[], None] = lambda: None,
) -> Path:
    """The file, made if it is missing; it is complete or absent.

    The operating system holds the lock and releases it if the process dies. Where the file system has no locks, or the
    holder takes too long, every process makes the file for itself and the last one's stays.

    Args:
        path: the file; its folder is made.
        make: called with an empty working folder and the path to write to.
        announce: called before ``make``, by the process that makes it.
        is_there: whether the file at the path is the right one; any other is replaced.
        waits: called once by a process that has to wait for another.

    Raises:
        RunError: what ``make`` raised, here or in the process that was waited for.
        OSError: the folder cannot be written.
    """
    if is_there(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failure = path.with_suffix(".failed")
    with _lock(path.with_suffix(".lock"), lambda: is_there(path), waits) as waited:
        if is_there(path):
            return path
        if waited and failure.exists():
            raise RunError(failure.read_text())
        failure.unlink(missing_ok=True)
        announce()
        work = Path(tempfile.mkdtemp(prefix="making-", dir=path.parent))
        try:
            make(work, work / path.name)
            os.replace(work / path.name, path)
        except RunError as error:
            with contextlib.suppress(OSError):  # a full disk, which the others will notice themselves
                failure.write_text(str(error))
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


@contextlib.contextmanager
def _lock(path: Path, is_there: Callable[[], bool], waits: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock, or wait until the file is there; yields whether another process held the lock meanwhile."""
    waited = False
    deadline = time.monotonic() + _PATIENCE
    with path.open("a") as file:
        while time.monotonic() < deadline:
            lock = try_lock(file, path, warn=False)  # without locks nothing is lost but time
            if lock is Lock.TAKEN:
                _clear_leftovers(path.parent)
            if lock is not Lock.HELD:
                break
            if not waited:
                waits()
            waited = True
            if is_there():
                break
            time.sleep(_LOOK_EVERY)
        yield waited


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left more than a day ago."""
    for left in folder.glob("making-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
