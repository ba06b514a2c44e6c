"""Reading a store: samples by row, straight from where they lie in the file.

Where chunks are not compressed, the file offset of every sample is listed once and a read is one ``preadv`` into the
caller's memory: no HDF5 lock, no copy, any number of threads and processes. Compressed stores go through HDF5. A read
that finds the file shorter than it was raises; mapping the file instead would end the process.

Checksums (fletcher32) are verified by HDF5 only; direct reads skip the 4 bytes, and go through HDF5 where a check is asked
for. After each read the file is checked: if it was changed or replaced since it was opened, what was read may be of two
files and is refused, unless what lies there now is known to hold the same.

Dimensions: T samples of the store, n samples read, C channels read, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.access import contained
from smoe_hpc.io.access.faults import UnreadableError, fault_number, faults_of
from smoe_hpc.io.access.open_files import DESCRIPTORS, HDF5, with_room
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.chunks import find_chunks, read_fully, require_filters
from smoe_hpc.io.store.contents import Contents
from smoe_hpc.io.store.digest import digest_store
from smoe_hpc.io.store.interface import FieldReader, check_verify, is_sampled
from smoe_hpc.io.store.variables import read_contents

_GONE = (-1, -1, -1)
_UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError)  # what HDF5 makes of a broken file


class Store(FieldReader):
    """One store file, open for reading; picklable (the copy opens the file anew in its own process).

    See :class:`~smoe_hpc.io.store.interface.FieldReader` for attributes and ways to read.

    Args:
        path: the file.
        verify: verify checksums even when a read does not ask for it: ``"off"``, ``"sampled"`` (a fixed pseudo-random 1 in
            64 rows), ``"all"``.

    Raises:
        DataError: missing, truncated or half-written file, not a store, one made by a later version, one whose parts do
            not fit together or lie in other files (named), or whose compressor is not installed.
    """

    def __init__(self, path: str | Path, verify: str = "off") -> None:
        self.path = Path(path)
        self.verify = check_verify(verify)
        self._key = object()  # of this store among the open files
        self._renewing = threading.Lock()
        self._digest: str | None = None
        with with_room(lambda: layout.open_hdf5(self.path)) as file:
            self.stamp = _stamp(self.path)
            try:
                self._take_contents(read_contents(self.path, file))
                fields = file[layout.FIELDS]
                require_filters(self.path, fields)
                self._chunks = find_chunks(self.path, fields)
                self._checksums = bool(fields.fletcher32)
            except DataError:
                raise
            except KeyError as error:
                if fault_number(error) is not None:
                    raise self._unreadable(error) from error
                raise DataError(f"{self.path} is not a whole store ({error.args[0]}); write it again") from error
            except _UNREADABLE as error:
                if fault_number(error) is not None:
                    raise self._unreadable(error) from error
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(f"{self.path} cannot be read as a store ({reason}); copy or write it again") from error
        verbatim = self._chunks is not None and self._chunks.verbatim
        self._offsets = self._chunks.offsets if self._chunks is not None and verbatim else None
        self._field_bytes = self.grid.shape[0] * self.grid.shape[1] * self.encoding.stored_type.itemsize

    def _take_contents(self, contents: Contents) -> None:
        self.grid, self.channels, self.units = contents.grid, contents.channels, contents.units
        self.coords, self.constants, self.attributes = contents.coords, contents.constants, contents.attributes
        self.encoding, self.transforms, self.num_samples = contents.encoding, contents.transforms, contents.num_samples

    @property
    def direct(self) -> bool:
        """Whether samples are read at their offsets in the file, without HDF5's lock."""
        return self._offsets is not None

    @property
    def has_checksums(self) -> bool:
        """Whether damage to a sample can be seen."""
        return self._checksums

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return self.path.parent

    def digest(self) -> str:
        """A sha256 of everything that is stored; of the fields, their checksums (4 bytes a sample are read).

        Where chunks have none (another tool wrote the file), all fields are read. Found once, then remembered.
        """
        if self._digest is None:
            opened = DESCRIPTORS.take(self._key, self._open_descriptor)
            try:
                with faults_of(self.path):
                    found = digest_store(self, self._chunks, opened.handle)
            finally:
                DESCRIPTORS.give(opened)
            self._is_renewed()
            self._digest = found
        return self._digest

    def remember_digest(self, digest: str) -> None:
        """Trust a digest that was found before (in the index of a folder, where the file has not changed since)."""
        self._digest = digest

    def describe_row(self, row: int) -> str:
        """The file and the sample's time, or its run and step."""
        return f"{self.path} {layout.describe_sample(self.coords, row)}"

    def _fill(self, rows: np.ndarray, indices: Sequence[int], out: np.ndarray, entries: np.ndarray, check: bool) -> None:
        while True:
            stamp = self.stamp
            self._read_as_it_is(rows, indices, out, entries, check)
            if not self._is_renewed() and self.stamp is stamp:
                return

    def _read_as_it_is(
        self, rows: np.ndarray, indices: Sequence[int], out: np.ndarray, entries: np.ndarray, check: bool
    ) -> None:
        if self._offsets is None or check or self.verify == "all":
            self._read_through_hdf5(rows, indices, out, entries)
        elif self.verify == "sampled" and (chosen := is_sampled(rows)).any():
            self._read_through_hdf5(rows[chosen], indices, out, entries[chosen])
            self._read_at_offsets(self._offsets[rows[~chosen]], indices, out, entries[~chosen])
        else:
            self._read_at_offsets(self._offsets[rows], indices, out, entries)

    def _read_at_offsets(self, offsets: np.ndarray, indices: Sequence[int], out: np.ndarray, entries: np.ndarray) -> None:
        target = memoryview(out.reshape(-1).view(np.uint8)) if out.size else memoryview(b"")
        stretches = [(first * self._field_bytes, count * self._field_bytes) for first, count in _stretches(indices)]
        sample_bytes = len(indices) * self._field_bytes
        opened = DESCRIPTORS.take(self._key, self._open_descriptor)
        descriptor = opened.handle
        try:
            for offset, entry in zip(offsets.tolist(), entries.tolist(), strict=True):
                at = entry * sample_bytes
                for first, size in stretches:
                    piece = target[at : at + size]
                    if os.preadv(descriptor, (piece,), offset + first) != size:
                        read_fully(self.path, descriptor, piece, offset + first)
                    at += size
        except OSError as error:
            raise self._unreadable(error) from error
        finally:
            DESCRIPTORS.give(opened)

    def _read_through_hdf5(self, rows: np.ndarray, indices: Sequence[int], out: np.ndarray, entries: np.ndarray) -> None:
        stretches = _stretches(indices)
        opened = HDF5.take(self._key, self._open_hdf5)
        try:
            fields = opened.handle[layout.FIELDS]
            for row, entry in zip(rows.tolist(), entries.tolist(), strict=True):
                try:
                    if len(stretches) == 1:
                        first, count = stretches[0]
                        fields.read_direct(out, np.s_[row, first : first + count], np.s_[entry])
                    else:  # each selection would pass the filters anew
                        out[entry] = fields[row][list(indices)]
                except (OSError, RuntimeError) as error:
                    if self._is_renewed():
                        return
                    raise (self._damaged(row) if fault_number(error) is None else self._unreadable(error)) from error
        finally:
            HDF5.give(opened)

    def _damaged(self, row: int) -> DataError:
        return DataError(
            f"{self.describe_row(row)} (row {row}) is damaged: its bytes do not fit their checksum; copy or write the file "
            f"again (`smoe-hpc data verify {self.path}` lists all damage)"
        )

    def _unreadable(self, error: Exception) -> UnreadableError:
        return UnreadableError(self.path, fault_number(error) or errno.EIO)

    def _open_hdf5(self) -> h5py.File:
        self._is_renewed()
        file = layout.open_hdf5(self.path)
        require_filters(self.path, contained.dataset(self.path, file, layout.FIELDS))
        return file

    def _open_descriptor(self) -> int:
        self._is_renewed()
        with faults_of(self.path):
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def _is_renewed(self) -> bool:
        """False while the file is as it was opened. True once where it was touched, or replaced by another copy:
        what was read until then may be of anything, and is to be read again.

        Raises:
            DataError: it was removed, or is another: the offsets would point anywhere.
        """
        if _stamp(self.path) == self.stamp:
            return False
        with self._renewing:
            now = _stamp(self.path)
            if now != self.stamp:
                self.close()
                if now == _GONE or not self._take_over():
                    what = "removed" if now == _GONE else "changed"
                    raise DataError(f"{self.path} was {what} since it was opened; start again, and leave stores in use alone")
        return True

    def _take_over(self) -> bool:
        """Go on with what lies there now, if its content is known to be the same."""
        if self._digest is None:
            return False
        try:
            there = Store(self.path)
            same = there.digest() == self._digest and np.array_equal(there._sample_offsets, self._sample_offsets)
        except UnreadableError:
            raise
        except DataError:
            return False
        if same:
            self.stamp = there.stamp
        return same

    @property
    def _sample_offsets(self) -> np.ndarray:
        return np.zeros(0, dtype=np.int64) if self._chunks is None else self._chunks.offsets

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        DESCRIPTORS.drop(self._key)
        HDF5.drop(self._key)

    def __del__(self) -> None:
        if hasattr(self, "_key"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_key": None, "_renewing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _key=object(), _renewing=threading.Lock())


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced: bytes, time of the last change (ns), inode.

    Raises:
        UnreadableError: the system does not say.
    """
    with faults_of(path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return _GONE
    return status.st_size, status.st_mtime_ns, status.st_ino


def _stretches(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of channels that lie side by side, so that each stretch is one read.

    >>> _stretches([0, 1, 2, 5, 4])
    [(0, 3), (5, 1), (4, 1)]
    """
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and index == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((index, 1))
    return found
