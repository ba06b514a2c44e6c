"""Reading files of runs: regular files only, and never waiting.

A folder of runs is shared: what lies there may be a pipe, which would block, may be unreadable, or of another format. Each is
an :class:`Unreadable` that says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from smoe_hpc.files import regular

_BLOCK = 1 << 13  # bytes of a file's end that are read first; each further block is twice as long
_MOST = 1 << 20  # bytes of a file's end that are looked at


class Unreadable(Exception):
    """A file of a run that cannot be read; says which and why."""


def open_regular(path: str) -> int:
    """Descriptor of a regular file, for reading.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        Unreadable: it is something else, or may not be read.
    """
    try:
        return regular.open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise Unreadable(f"{os.path.basename(path)}: {error.strerror}") from None
    except regular.NotPlainError as error:
        raise Unreadable(f"{os.path.basename(path)} {error}") from None


def read_start(path: str, most: int) -> str:
    """The first bytes of a regular file as text, what is no UTF-8 replaced. FileNotFoundError, Unreadable."""
    file = open_regular(path)
    try:
        return os.read(file, most).decode(errors="replace")
    except OSError as error:
        raise Unreadable(f"{os.path.basename(path)}: {error.strerror}") from None
    finally:
        os.close(file)


def all_events(path: str) -> Iterator[dict[str, Any]]:
    """JSON objects of a file's lines, the oldest first; lines that are none are passed over. Raises as `newest_events`."""
    with os.fdopen(open_regular(path), "rb") as file:
        for line in file:
            value = _parsed(line)
            if value is not None:
                yield value


def newest_events(path: str) -> Iterator[dict[str, Any]]:
    """JSON objects of a file's last whole lines, the newest first; lines that are none are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is something else, or may not be read.
    """
    for line in _lines_from_the_end(path):
        value = _parsed(line)
        if value is not None:
            yield value


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lines_from_the_end(path: str) -> Iterator[bytes]:
    file = open_regular(path)
    try:
        offset = os.fstat(file).st_size
        least, block = max(offset - _MOST, 0), _BLOCK
        rest = b""
        while offset > least:
            begin, block = max(offset - block, least), 2 * block
            rest = os.pread(file, offset - begin, begin) + rest
            offset = begin
            first, *whole = rest.split(b"\n")
            yield from (line for line in reversed(whole) if line)
            rest = first
        if least == 0 and rest:  # else it is the end of a line
            yield rest
    except OSError as error:
        raise Unreadable(f"{os.path.basename(path)}: {error.strerror}") from None
    finally:
        os.close(file)
