"""Files that are whole or not there: written beside, synced, checksummed, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from smoe_hpc.errors import DataError
from smoe_hpc.files import regular

_CHUNK = 1 << 22


def sync(path: Path) -> None:
    """Make what was written to a file, or the new names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part. OSError if the disk is full."""
    partial = path.with_name(f".{path.name}.{os.urandom(6).hex()}.partial")  # a name that cannot be guessed
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_result(path: Path, content: bytes | str) -> None:
    """Write a small file whole (see `write_whole`), and its folder where that is missing; a text in UTF-8.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole (see `write_whole`)."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def open_to_append(path: Path) -> IO[bytes]:
    """Open a regular file for reading and for writing at its end, made if missing; links and pipes are refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with contextlib.suppress(FileNotFoundError):
            os.close(regular.open_regular(path, follow=False))  # or an error that names what it is
        return os.fdopen(os.open(path, flags, 0o666), "ab+")
    except regular.NotPlainError as error:
        raise OSError(f"{path} {error}") from None


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading, and nothing else: a pipe would wait for ever, a link may lead out of its folder.

    Raises:
        OSError: it is missing, may not be read, or is no regular file.
    """
    try:
        return os.fdopen(regular.open_regular(path, follow=False), "rb")
    except regular.NotPlainError as error:
        raise OSError(f"{path} {error}") from None


def read_json(path: Path, most: int) -> Any:
    """Value of a JSON file of at most ``most`` bytes.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is larger, or no JSON.
        RecursionError: it is nested too deep.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return json.loads(content)


def digest_of(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 (hexadecimal digits) of a regular file's content; OSError as `open_regular`."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON form, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
