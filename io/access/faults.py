"""Files that cannot be read, though nothing is known to be wrong with them.

No permission, no descriptor left, a server that does not answer: such a fault says nothing about the content of a file,
so it must never pass for damage. Code that looks for damage tells the two apart by the class of the error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from smoe_hpc.errors import DataError

_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_IN_WORDS = re.compile(r"errno = (\d+)")  # so HDF5 says it


class UnreadableError(DataError):
    """A file that cannot be read at this moment, by this process; it may be whole.

    Args:
        path: the file.
        number: of the system's error, as in `errno`.
    """

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"{path} cannot be read: {os.strerror(number)}; {_remedy(number)}. The file itself may be whole")
        self.path, self.number = path, number

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[Path, int]]:
        return type(self), (self.path, self.number)

    @property
    def for_want_of_descriptors(self) -> bool:
        """Whether it could be read if other files were closed."""
        return self.number in _DESCRIPTORS


@contextlib.contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Turn the system's errors within into those of a file or folder that cannot be read.

    Raises:
        UnreadableError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UnreadableError(path, fault_number(error) or errno.EIO) from error


def fault_number(error: Exception) -> int | None:
    """The number of the system's error behind an error of ours, of Python or of HDF5; None where the system has no part in it.

    >>> fault_number(PermissionError(13, "Permission denied")), fault_number(OSError("filter returned failure"))
    (13, None)
    >>> fault_number(OSError("Can't read data (file read failed: errno = 5, error message = 'Input/output error')"))
    5
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    named = _IN_WORDS.search(str(error))
    return int(named[1]) or None if named else None


def _remedy(number: int) -> str:
    if number == errno.EMFILE:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"this process may open {soft} files: raise that (ulimit -n)"
    if number == errno.ENFILE:
        return "all processes of this machine together have too many files open: close some"
    if number in (errno.EACCES, errno.EPERM):
        return "ask its owner for the right to read it"
    return "check its file system, and start again"
