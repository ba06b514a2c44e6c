"""Reading a store: samples by row, straight from their place in the file.

Where chunks are stored plainly, the file offset of every sample is listed once and a read is one ``preadv`` into the
caller's memory: no HDF5 lock, no copy, any number of threads and processes. Compressed stores go through HDF5. A read
that finds the file shorter than it was raises; mapping the file instead would end the process.

Checksums (fletcher32) are verified on the HDF5 way only; the direct way steps over the 4 bytes unless it is asked to
check, and then goes through HDF5 too. After each read the file is looked at: was it changed or replaced since it was
opened, what was read may be of two files, and is refused.

Dimensions: T samples of the store, n samples read, C channels read, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io import layout
from smoe_hpc.io.chunks import find_chunks, read_fully, require_filters
from smoe_hpc.io.digest import digest_store
from smoe_hpc.io.encoding import STORED_TYPES, Encoding
from smoe_hpc.io.fields import FieldReader, check_verify, is_sampled
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.transforms import NONE, check_transforms

_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}


class Store(FieldReader):
    """One store file, open for reading; picklable (the copy opens the file anew in its own process).

    See :class:`~smoe_hpc.io.fields.FieldReader` for attributes and ways to read.

    Args:
        path: the file.
        verify: whose checksums are held against the samples even when a read does not ask for it: ``"off"`` nobody's,
            ``"sampled"`` those of a fixed pseudo-random 1 in 64 rows, ``"all"``.

    Raises:
        DataError: missing, truncated or half-written file, not a store, one made by a later version, one whose parts do
            not fit together (named), or whose compressor is not installed.
    """

    def __init__(self, path: str | Path, verify: str = "off") -> None:
        self.path = Path(path)
        self.verify = check_verify(verify)
        self._descriptor: int | None = None
        self._hdf5: tuple[int, h5py.File] | None = None
        self._opening = threading.Lock()  # of two threads that open at once, one would leave its file open for ever
        self._digest: str | None = None
        with layout.open_hdf5(self.path) as file:
            self.stamp = _stamp(self.path)
            try:
                self._read_layout(file)
            except KeyError as error:
                raise DataError(f"{self.path} is not a whole store ({error.args[0]}); write it again") from error
            fields = file[layout.FIELDS]
            require_filters(self.path, fields)
            self._chunks = find_chunks(self.path, fields)
            self._checksums = bool(fields.fletcher32)
        plain = self._chunks is not None and self._chunks.plain
        self._offsets = self._chunks.offsets if self._chunks is not None and plain else None
        self._field_bytes = self.grid.shape[0] * self.grid.shape[1] * self.encoding.stored_type.itemsize

    def _read_layout(self, file: h5py.File) -> None:
        version = file.attrs.get(layout.VERSION_ATTRIBUTE)
        if version is None or layout.FIELDS not in file:
            raise DataError(f"{self.path} is HDF5 but not a store; convert it with `smoe-hpc data convert`")
        if int(version) > layout.VERSION:
            raise DataError(f"{self.path} is a store of version {version}; this smoe-hpc is older: update it")
        fields = file[layout.FIELDS]
        if fields.dtype not in _NAMES:
            raise DataError(f"{self.path} holds {fields.dtype}; a store holds {', '.join(STORED_TYPES)}: convert it again")
        self.num_samples = int(fields.shape[0])
        self.channels = list(file["channel"].asstr()[:])
        self.units = list(file["units"].asstr()[:])
        try:
            self.grid = Grid(file.attrs[layout.GRID_ATTRIBUTE], file["lat"][:], file["lon"][:])
            self.encoding = Encoding(_NAMES[fields.dtype], file["scale"][:], file["offset"][:])
            transforms = list(file["transform"].asstr()[:]) if "transform" in file else [NONE] * len(self.channels)
            self.transforms = check_transforms(transforms, self.channels)
            names = [name for name in layout.COORDINATES if name in file]
            self.coords = layout.check_coords({name: file[name][:] for name in names})
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error
        self.constants = _constants(file)
        own = layout.OWN_ATTRIBUTES
        self.attributes = {name: value for name, value in file.attrs.items() if name not in own}
        expected = (len(next(iter(self.coords.values()))), len(self.channels), *self.grid.shape)
        if fields.shape != expected or not len(self.units) == len(self.encoding.scale) == len(self.channels):
            raise DataError(f"{self.path}: fields are {fields.shape} but their names say {expected}; write the store again")
        if len(set(self.channels)) != len(self.channels):
            raise DataError(f"{self.path}: channels {self.channels} are not all different; write the store again")

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
            self._digest = digest_store(self, self._chunks, self._open_descriptor())
            self._require_unchanged()
        return self._digest

    def remember_digest(self, digest: str) -> None:
        """Take somebody's word for the digest (the index of a folder, where the file has not changed since)."""
        self._digest = digest

    def describe_row(self, row: int) -> str:
        """The file and the sample's time, or its run and step."""
        return f"{self.path} {layout.describe_sample(self.coords, row)}"

    def _fill(
        self, rows: np.ndarray, places: Sequence[int], out: np.ndarray, where: np.ndarray, check: bool
    ) -> None:
        if self._offsets is None or check or self.verify == "all":
            self._read_through_hdf5(rows, places, out, where)
        elif self.verify == "sampled" and (chosen := is_sampled(rows)).any():
            self._read_through_hdf5(rows[chosen], places, out, where[chosen])
            self._read_at_offsets(self._offsets[rows[~chosen]], places, out, where[~chosen])
        else:
            self._read_at_offsets(self._offsets[rows], places, out, where)
        self._require_unchanged()

    def _read_at_offsets(self, offsets: np.ndarray, places: Sequence[int], out: np.ndarray, where: np.ndarray) -> None:
        descriptor = self._open_descriptor()
        target = memoryview(out.reshape(-1).view(np.uint8)) if out.size else memoryview(b"")
        stretches = [(first * self._field_bytes, count * self._field_bytes) for first, count in _stretches(places)]
        sample_bytes = len(places) * self._field_bytes
        for offset, place in zip(offsets.tolist(), where.tolist(), strict=True):
            position = place * sample_bytes
            for first, size in stretches:
                piece = target[position : position + size]
                if os.preadv(descriptor, (piece,), offset + first) != size:
                    read_fully(self.path, descriptor, piece, offset + first)
                position += size

    def _read_through_hdf5(self, rows: np.ndarray, places: Sequence[int], out: np.ndarray, where: np.ndarray) -> None:
        fields = self._open_hdf5()[layout.FIELDS]
        stretches = _stretches(places)
        for row, place in zip(rows.tolist(), where.tolist(), strict=True):
            try:
                if len(stretches) == 1:
                    first, count = stretches[0]
                    fields.read_direct(out, np.s_[row, first : first + count], np.s_[place])
                else:  # each selection would pass the filters anew
                    out[place] = fields[row][list(places)]
            except (OSError, RuntimeError) as error:
                self._require_unchanged()
                raise self._damaged(row) from error

    def _damaged(self, row: int) -> DataError:
        return DataError(
            f"{self.describe_row(row)} (row {row}) is damaged: its bytes do not fit their checksum; copy or write the file "
            f"again (`smoe-hpc data verify {self.path}` lists all damage)"
        )

    def _open_hdf5(self) -> h5py.File:
        with self._opening:
            if self._hdf5 is None or self._hdf5[0] != os.getpid():  # a handle must not cross a fork
                self._require_unchanged()
                file = layout.open_hdf5(self.path)
                require_filters(self.path, file[layout.FIELDS])
                self._hdf5 = os.getpid(), file
            return self._hdf5[1]

    def _open_descriptor(self) -> int:
        if (descriptor := self._descriptor) is not None:
            return descriptor
        with self._opening:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise DataError(f"{self.path} cannot be opened any more: {error.strerror}") from error
                self._require_unchanged()
            return self._descriptor

    def _require_unchanged(self) -> None:
        try:
            now: tuple[int, ...] | None = _stamp(self.path)
        except OSError:
            now = None
        if now != self.stamp:  # the offsets would point anywhere
            self.close()
            what = "removed" if now is None else "changed"
            raise DataError(f"{self.path} was {what} since it was opened; start again, and leave stores in use alone")

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        hdf5, self._hdf5 = self._hdf5, None
        if hdf5 is not None and hdf5[0] == os.getpid():
            hdf5[1].close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None, "_hdf5": None, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock())


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _stretches(places: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of channels that lie side by side, so that each stretch is one read.

    >>> _stretches([0, 1, 2, 5, 4])
    [(0, 3), (5, 1), (4, 1)]
    """
    found: list[tuple[int, int]] = []
    for place in places:
        if found and place == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((place, 1))
    return found


def _constants(file: h5py.File) -> dict[str, np.ndarray]:
    if "constants" not in file:
        return {}
    names, types = file["constant"].asstr()[:], file["constant_dtype"].asstr()[:]
    return {name: values.astype(kind) for name, kind, values in zip(names, types, file["constants"][:], strict=True)}
