"""Small files that are there whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.io import layout


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it. Of several writers one wins; nobody reads half a file.

    Raises:
        DataError: it cannot be written.
    """
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(layout.PARTIAL_SUFFIX, path.name + ".", path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's files are private, but others read these
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
