"""Files that may come from anybody: read only if they are regular files of a sensible size, and JSON only if it is plain.

A FIFO, a device or a socket under the name of a store, an index or a cached result would block whoever opens it; JSON
that is nested a hundred thousand deep, or a file of many gigabytes, would end the process. Here they are told at once.
A symbolic link is followed (data often lie on other storage), and what it leads to must be a regular file.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from smoe_hpc.errors import DataError

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
}
_WITHOUT_WAITING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class NotPlainError(ValueError):
    """Why a file or a text is not read: the end of a sentence that its caller completes with the file and the remedy."""


def require_regular(path: Path) -> None:
    """Raise unless a file that exists is a regular one, or a link to one.

    Raises:
        DataError: a FIFO, device, socket or directory; a link that leads nowhere or in circles.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}; restore the file, or remove it") from error
    try:
        _check(status)
    except NotPlainError as error:
        raise DataError(f"{path} {error}; remove it, or put the file itself there") from error


def open_regular(path: str | Path, *, follow: bool = True) -> int:
    """A descriptor of a regular file, for reading; never waits.

    Args:
        path: of the file.
        follow: whether it may be a symbolic link to one.

    Raises:
        OSError: missing, or not to be opened.
        NotPlainError: no regular file.
    """
    _check(os.stat(path, follow_symlinks=follow))  # before it is opened, which alone does something to some devices
    descriptor = os.open(path, _WITHOUT_WAITING | (0 if follow else os.O_NOFOLLOW))
    try:
        _check(os.fstat(descriptor))
    except NotPlainError:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; see `open_regular`.

    Raises:
        OSError: missing, or not to be read.
        NotPlainError: no regular file, or a larger one.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise NotPlainError(f"has more than {limit >> 20} MiB, which no such file has")
    return content


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        NotPlainError: no JSON in UTF-8, no object, nested too deeply, or with NaN or infinity.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode(), parse_constant=_refuse_constant)
    except NotPlainError:
        raise
    except RecursionError:
        raise NotPlainError("is nested too deeply") from None
    except ValueError as error:
        raise NotPlainError(f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise NotPlainError(f"holds {type(content).__name__} instead of an object with names")
    return content


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotPlainError(f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a regular file")


def _refuse_constant(name: str) -> float:
    raise NotPlainError(f"holds {name}, where a finite number is due")
