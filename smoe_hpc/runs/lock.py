"""A run's lock: held by the process that trains, looked at by everybody else.

The lock is a file that says who holds it, ``process 123 on node1 of Slurm job 77``, or who held it last. The system lets
go of it when its process dies.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from smoe_hpc.errors import RunError
from smoe_hpc.files import writing
from smoe_hpc.files.locks import Lock, try_lock
from smoe_hpc.launch.job import job_id
from smoe_hpc.runs.reading import Unreadable, open_regular

_BYTES = 1000  # that are read of the text


@dataclass(frozen=True)
class Holder:
    """Who holds a run's lock, or held it last.

    Attributes:
        text: what the lock says.
        held: whether it is held; None where the file system has no locks.
        since: when it was last taken, in seconds since 1970.
    """

    text: str
    held: bool | None
    since: float

    @property
    def job(self) -> str | None:
        """The Slurm job that took it."""
        found = re.search(r"Slurm job (\S+)", self.text)
        return found[1] if found else None

    def goes_on(self) -> bool | None:
        """Whether its process is there, where no lock tells; None if only its Slurm job can tell."""
        named = re.match(r"process (\d+) on (\S+)(?: of Slurm job (\S+))?", self.text)
        if named is None:
            return False
        if named[2] == socket.gethostname():
            return os.path.exists(f"/proc/{named[1]}")
        return None if named[3] is not None else False


@contextlib.contextmanager
def hold(lock: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if missing.

    On a file system without locks it is not held: a warning says so.

    Raises:
        RunError: another process holds it (it says which), or the folder cannot be made.
    """
    run = lock.parent
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = writing.open_to_append(lock)
    except OSError as error:
        remedy = "remove it, or choose" if os.path.lexists(lock) else "choose"
        raise RunError(f"run directory {run} cannot be written: {error}; {remedy} another run.root") from error
    with file:
        try:
            free = _take(file, lock)
        except OSError as error:
            raise RunError(f"{lock} cannot be locked: {error.strerror}; choose another run.root") from error
        if not free:
            file.seek(0)
            holder = file.read(_BYTES).decode(errors="replace").strip() or "another process"
            raise RunError(f"run directory {run} is in use by {holder}: wait for it, or choose another name")
        file.truncate(0)
        job = job_id(os.environ)
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f' of Slurm job {job}' if job else ''}\n".encode())
        file.flush()
        yield


def _take(file: IO[bytes], path: Path) -> bool:
    """Lock a file for this process alone; False where another holds it for longer than a mere look takes."""
    for _ in range(11):
        if try_lock(file, path) is not Lock.HELD:  # without locks it is for the user to see to
            return True
        time.sleep(0.1)  # `smoe-hpc status` finds out with a short lock whether the run goes on
    return False


def look(lock: str) -> Holder | None:
    """Who holds a lock; None where there is no lock.

    Raises:
        Unreadable: it cannot be read.
    """
    try:
        file = open_regular(lock)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        taken = try_lock(file, lock, shared=True)
        held = None if taken is Lock.NONE else taken is Lock.HELD
        return Holder(os.read(file, _BYTES).decode(errors="replace"), held, os.fstat(file).st_mtime)
    except OSError as error:
        raise Unreadable(f"{os.path.basename(lock)}: {error.strerror}") from None
    finally:
        os.close(file)
