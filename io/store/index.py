"""``index.json``: what the files of a folder are, so that a missing, added or changed one is noticed at once.

It also keeps each file's digest, which would otherwise have to be gathered from all of them.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import parse_json, read_bytes
from smoe_hpc.io.access.faults import UnreadableError, faults_of
from smoe_hpc.io.store import layout

INDEX = "index.json"
FORMAT = 1
_NOT_THERE = {errno.ENOENT: "is missing", errno.ENOTDIR: "is missing", errno.ELOOP: "is a link in circles"}
_MOST_BYTES = 64 << 20  # some 300 a file
_REMEDY = "restore the file, or, if it is as it should be, write the index anew (`smoe-hpc data verify {} --index`)"


@dataclass(frozen=True)
class Entry:
    """One file of the folder: name, bytes, time of its last change (ns), digest, samples, first and last of them."""

    name: str
    bytes: int
    changed_ns: int
    digest: str
    samples: int
    first: str
    last: str

    def __post_init__(self) -> None:
        texts = self.name, self.digest, self.first, self.last
        numbers = self.bytes, self.changed_ns, self.samples
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            raise DataError(f"its entry {self.name!r:.80} has values of other types")
        if os.path.basename(self.name) != self.name or not self.name.endswith(layout.SUFFIX) or not self.name.isprintable():
            raise DataError(f"it lists {self.name!r:.80}, which is not the plain name of a store file of its folder")


@dataclass(frozen=True)
class Index:
    """The files of a folder in order, and what they share.

    Args:
        files: by their first sample.
        about: plain values for people and scripts: channels with their units, grid in words, stored type, hours between
            samples, whether the fields are synthetic.
    """

    files: tuple[Entry, ...]
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if len({entry.name for entry in self.files}) != len(self.files) or not self.files:
            raise DataError("it lists no file, or one twice")

    def require_size(self, folder: Path, number: int) -> None:
        """Raise unless a file is there and as large as it was.

        Raises:
            DataError: missing, or of another size.
            UnreadableError: the system does not say.
        """
        entry, remedy = self.files[number], _REMEDY.format(folder)
        path = folder / entry.name
        with faults_of(path):
            try:
                size = path.stat().st_size
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                reason = _NOT_THERE[error.errno]
                raise DataError(f"{path} {reason} though {folder / INDEX} lists it; {remedy}") from error
        if size != entry.bytes:
            raise DataError(f"{path} has {size} bytes, but {folder / INDEX} says {entry.bytes}; {remedy}")

    def not_listed(self, folder: Path) -> list[str]:
        """One sentence for each store file of the folder that the index does not list."""
        listed = {entry.name for entry in self.files}
        remedy = f"move it away, or write the index anew (`smoe-hpc data verify {folder} --index`)"
        return [
            f"{one} is not in {folder / INDEX}; {remedy}"
            for one in sorted(folder.glob("*" + layout.SUFFIX))
            if one.name not in listed
        ]

    def fits(self, number: int, size: int, changed_ns: int) -> bool:
        """Whether a file of that size and time of change is as the index was written of it, so that its digest still holds."""
        entry = self.files[number]
        return (size, changed_ns) == (entry.bytes, entry.changed_ns)


def read_index(folder: str | Path) -> Index | None:
    """The index of a folder, None where there is none.

    Raises:
        DataError: a file of that name that is not an index, or lists anything but plain names of store files.
        UnreadableError: the system does not give it.
    """
    path = Path(folder) / INDEX
    remedy = f"remove it, or write it anew (`smoe-hpc data verify {folder} --index`)"
    try:
        content = parse_json(read_bytes(path, _MOST_BYTES))
        files = tuple(Entry(**entry) for entry in content.pop("files"))
        if content.pop("format") != FORMAT:
            raise KeyError("format")
        return Index(files, content)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path} is not an index of stores (a link in circles); {remedy}") from error
        raise UnreadableError(path, error.errno or errno.EIO) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not an index of stores ({error}); {remedy}") from error
