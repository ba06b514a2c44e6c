"""Locks of files against other processes, on file systems that have them and on those that have none.

A lock is the kernel's (flock), so that a process which dies lets go of it. Some network file systems are mounted without
locks (Lustre without ``-o flock``, NFS without its lock daemon): work goes on there, after one warning.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import warnings
from typing import Any

# What a system says that cannot lock; EINVAL comes from some file systems in user space.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
_HELD = frozenset({errno.EAGAIN, errno.EACCES})
_warned = False


class Lock(enum.Enum):
    """What became of asking for a lock."""

    TAKEN = enum.auto()
    HELD = enum.auto()
    """Another process has it."""
    NONE = enum.auto()
    """The file system has no locks."""


def try_lock(file: Any, name: object, *, shared: bool = False, warn: bool = True) -> Lock:
    """Lock an open file without waiting; closing it lets go.

    Args:
        file: an open file or descriptor; over NFS, open for writing unless ``shared``.
        name: what the warning calls it.
        shared: with others who only look.
        warn: whether to say, once in a process, that there are no locks.

    Raises:
        OSError: anything else that keeps the file from being locked.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return Lock.HELD
        if not says_no_locks(error.errno):
            raise
        if warn:
            warn_of_no_locks(name)
        return Lock.NONE
    return Lock.TAKEN


def says_no_locks(number: int | None) -> bool:
    """Whether an error of this number, which a lock met, means that the file system has none."""
    return number in _NO_LOCKS


def warn_of_no_locks(name: object) -> None:
    """Say it, once in a process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the file system of {name} has no locks, so nothing keeps two jobs from writing to one run or store at the same "
            "time: see to it that they do not, or have it mounted with locks (flock)",
            stacklevel=3,
        )
