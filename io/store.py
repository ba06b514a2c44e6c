"""Reading a store: samples by row, straight from their place in the file.

Where chunks are stored plainly, the file offset of every sample is listed once and a read is one ``preadv`` into the
caller's memory: no HDF5 lock, no copy, any number of threads and processes. Compressed stores go through HDF5. A read
that finds the file shorter than it was raises; mapping the file instead would end the process.

Checksums (fletcher32) are verified on the HDF5 way only; the direct way steps over the 4 bytes.

Dimensions: T samples of the store, n samples read, C channels read, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io import layout
from smoe_hpc.io.grids import Grid


class Store:
    """One store file, open for reading; picklable (the copy opens the file anew in its own process).

    Attributes:
        path: the file.
        grid: the points.
        channels: names of the stored channels, in order.
        units: one text a channel.
        coords: ``time`` [T] datetime64[s], or ``run``, ``step``, ``member`` [T] int64.
        constants: name to [H, W], integers or float64.
        attributes: what the writer was told.
        direct: whether samples are read at their offsets (True) or through HDF5.

    Raises:
        DataError: missing, truncated or half-written file, not a store, or made by a later version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._hdf5: tuple[int, h5py.File] | None = None
        with layout.open_hdf5(self.path) as file:
            self._stamp = _stamp(self.path)
            _check_is_store(self.path, file)
            fields = file[layout.FIELDS]
            self.num_samples = int(fields.shape[0])
            self.grid = Grid(file.attrs[layout.GRID_ATTRIBUTE], file["lat"][:], file["lon"][:])
            self.channels: list[str] = list(file["channel"].asstr()[:])
            self.units: list[str] = list(file["units"].asstr()[:])
            self.coords = {name: file[name][:] for name in layout.COORDINATES if name in file}
            if "time" in self.coords:
                self.coords["time"] = self.coords["time"].astype("datetime64[s]")
            self.constants = _constants(file)
            own = layout.OWN_ATTRIBUTES
            self.attributes = {name: value for name, value in file.attrs.items() if name not in own}
            self._offsets = _chunk_offsets(self.path, fields)
        self._index = {name: i for i, name in enumerate(self.channels)}
        self._field_bytes = self.grid.shape[0] * self.grid.shape[1] * layout.STORED_TYPE.itemsize

    @property
    def direct(self) -> bool:
        """Whether samples are read at their offsets in the file."""
        return self._offsets is not None

    def channel_indices(self, channels: Sequence[str]) -> list[int]:
        """Places of the named channels.

        Raises:
            DataError: an unknown name, with the nearest known one.
        """
        for name in channels:
            if name not in self._index:
                raise DataError(f"{self.path} has no channel {name!r}; {layout.nearest(name, self.channels)}")
        return [self._index[name] for name in channels]

    def read(
        self, rows: Sequence[int] | np.ndarray, channels: Sequence[str] | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Samples by row, in the order asked for; a row may be asked for twice.

        Args:
            rows: [n] from 0 to T - 1.
            channels: names of the channels wanted, all when None.
            out: [n, C, H, W] float32, C-contiguous, to be filled instead of new memory (pinned or shared, say).

        Returns:
            [n, C, H, W] float32.

        Raises:
            DataError: a row out of range, an unknown channel, a file that was shortened; where chunks are compressed, and
                so read through HDF5, also a checksum that fails (plain chunks are read past their checksums).
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < self.num_samples):
            bad = int(rows.min()) if rows.min() < 0 else int(rows.max())
            raise DataError(f"{self.path} has no row {bad}; its samples are rows 0 to {self.num_samples - 1}")
        places = range(len(self.channels)) if channels is None else self.channel_indices(channels)
        shape = (len(rows), len(places), *self.grid.shape)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise DataError(f"out is {out.dtype} {out.shape}; it must be C-contiguous float32 {shape}")
        if self._offsets is None:
            self._read_through_hdf5(rows, places, out)
        else:
            self._read_at_offsets(self._offsets[rows], places, out)
        return out

    def _read_at_offsets(self, offsets: np.ndarray, places: Sequence[int], out: np.ndarray) -> None:
        descriptor = self._open_descriptor()
        target = memoryview(out.data).cast("B") if out.size else memoryview(b"")
        stretches = [(first * self._field_bytes, count * self._field_bytes) for first, count in _stretches(places)]
        position = 0
        for offset in offsets.tolist():
            for first, size in stretches:
                piece = target[position : position + size]
                if os.preadv(descriptor, (piece,), offset + first) != size:
                    _read_fully(self.path, descriptor, piece, offset + first)
                position += size

    def _read_through_hdf5(self, rows: np.ndarray, places: Sequence[int], out: np.ndarray) -> None:
        if self._hdf5 is None or self._hdf5[0] != os.getpid():  # a handle must not cross a fork
            self._check_unchanged(_stamp(self.path))
            self._hdf5 = os.getpid(), layout.open_hdf5(self.path)
        fields = self._hdf5[1][layout.FIELDS]
        for n, row in enumerate(rows.tolist()):
            try:
                sample = fields[row]
            except OSError as error:
                name = layout.describe_sample(self.coords, row)
                raise DataError(f"{self.path}: sample {name} (row {row}) is damaged; write the store again") from error
            out[n] = sample[list(places)]

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{self.path} cannot be opened any more: {error.strerror}") from error
            self._check_unchanged(_stamp(self._descriptor))
        return self._descriptor

    def _check_unchanged(self, stamp: tuple[int, int]) -> None:
        if stamp != self._stamp:  # the offsets would point anywhere
            self.close()
            raise DataError(f"{self.path} was changed since it was opened; start again, and leave stores in use alone")

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        hdf5, self._hdf5 = self._hdf5, None
        if hdf5 is not None and hdf5[0] == os.getpid():
            hdf5[1].close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None, "_hdf5": None}

    def __len__(self) -> int:
        return self.num_samples


def _stamp(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


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


def _read_fully(path: Path, descriptor: int, target: memoryview, offset: int) -> None:
    """Piece by piece: a signal or a network file system may cut a read short; at the file's end nothing comes."""
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:]], offset + done)
        if got == 0:
            raise layout.truncated(path)
        done += got


def _check_is_store(path: Path, file: h5py.File) -> None:
    version = file.attrs.get(layout.VERSION_ATTRIBUTE)
    if version is None or layout.FIELDS not in file:
        raise DataError(f"{path} is HDF5 but not a store; convert it with `smoe-hpc data convert`")
    fields = file[layout.FIELDS]
    plain = (file["scale"][:] == 1).all() and (file["offset"][:] == 0).all()
    if int(version) > layout.VERSION or fields.dtype != layout.STORED_TYPE or not plain:
        raise DataError(f"{path} is a store of version {version} of {fields.dtype}; this smoe-hpc is older: update it")


def _constants(file: h5py.File) -> dict[str, np.ndarray]:
    if "constants" not in file:
        return {}
    names, types = file["constant"].asstr()[:], file["constant_dtype"].asstr()[:]
    return {name: values.astype(kind) for name, kind, values in zip(names, types, file["constants"][:], strict=True)}


def _chunk_offsets(path: Path, fields: h5py.Dataset) -> np.ndarray | None:
    """[T] int64 file offset of each sample, or None where chunks are compressed or laid out otherwise.

    Raises:
        DataError: a sample without a chunk, or one that would lie beyond the end of the file.
    """
    filters = fields.id.get_create_plist()
    codes = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
    if fields.chunks != (1, *fields.shape[1:]) or any(code != h5py.h5z.FILTER_FLETCHER32 for code in codes):
        return None
    offsets = np.full(fields.shape[0], -1, dtype=np.int64)
    ends = 0

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        nonlocal ends
        offsets[chunk.chunk_offset[0]] = chunk.byte_offset
        ends = max(ends, chunk.byte_offset + chunk.size)

    fields.id.chunk_iter(note)
    if (offsets < 0).any():
        raise DataError(f"{path} lacks sample {int(np.argmin(offsets >= 0))} of {len(offsets)}; write the store again")
    if ends > path.stat().st_size:
        raise layout.truncated(path)
    return offsets
