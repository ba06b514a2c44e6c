"""Writing a store: whole or not at all.

Samples are appended in slabs to ``<name>.partial``, which gets its final name only when every sample is there and on
the disk. So whatever stops the writer, a file under the final name can be trusted. The writer takes physical values;
transforms, scales and offsets are its own business.

Dimensions: T samples of the store, n samples of a slab, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io import layout
from smoe_hpc.io.chunks import compression_options
from smoe_hpc.io.encoding import Encoding, check_type
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store_variables import lay_out
from smoe_hpc.io.transforms import NONE, apply, check_transforms

_FREE_MARGIN = 4 << 20  # bytes beside the fields: coordinates, index, the file system's own


class StoreWriter:
    """Context manager that makes one store.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny.h5"
    >>> times = np.datetime64("2019-03-01T00") + np.arange(2) * np.timedelta64(1, "h")
    >>> with StoreWriter(path, Grid.plane(2, 3), ["t2m"], ["K"], coords={"time": times}) as writer:
    ...     writer.write(0, np.full((2, 1, 2, 3), 280.0))
    >>> path.exists()
    True

    Args:
        path: final name; its folder is made.
        grid: (H, W) and where the points are.
        channels: names of the C channels, all different.
        units: one text a channel (K, m2 s-2, 1).
        coords: ``time`` [T] datetime64, perhaps with ``member`` [T] int, or ``run``, ``step``, ``member``; they set T.
        constants: name to [H, W], integers or floats.
        attributes: text and numbers kept with the file: sources, regridding, converter.
        overwrite: replace a store of the same name (at the moment of renaming) instead of refusing.
        dtype: ``"float32"``, ``"float16"`` or ``"int16"``, where no encoding is given.
        encoding: scale and offset of each channel, in stored space (after the transform). None: none for float32, and
            for the other types those of the bounds in :mod:`smoe_hpc.io.channels`.
        transforms: one text a channel, ``"none"`` or ``"log:0.001"``. None: none of them; with bounds from
            :mod:`smoe_hpc.io.channels`, what stands there.
        compression: ``"gzip"``, or ``"zstd"``, ``"lz4"``, ``"blosc"`` (package hdf5plugin); such stores are smaller
            and slower to read.

    Raises:
        DataError: broken arguments, a store already there, too little space; while writing: values that are not
            finite or outside what the encoding holds, a slab of another shape, a disk that is full; at the end:
            samples never written.
    """

    def __init__(
        self,
        path: str | Path,
        grid: Grid,
        channels: Sequence[str],
        units: Sequence[str],
        *,
        coords: Mapping[str, np.ndarray],
        constants: Mapping[str, np.ndarray] | None = None,
        attributes: Mapping[str, str | int | float] | None = None,
        overwrite: bool = False,
        dtype: str = "float32",
        encoding: Encoding | None = None,
        transforms: Sequence[str] | None = None,
        compression: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.grid, self.channels, self.units = grid, list(channels), list(units)
        if not self.channels or len(set(self.channels)) != len(self.channels) or len(self.units) != len(self.channels):
            raise DataError(f"channels {self.channels} must be different names with one unit each, not {self.units}")
        self.encoding, self.transforms = _choose(self.channels, dtype, encoding, transforms)
        self._transformed = [place for place, transform in enumerate(self.transforms) if transform != NONE]
        self.compression, self.filters = compression, compression_options(compression)
        self.coords = layout.check_coords(dict(coords))
        self.constants = {name: np.asarray(values) for name, values in (constants or {}).items()}
        for name, values in self.constants.items():
            if values.shape != grid.shape or not np.isfinite(values).all():
                raise DataError(f"constant {name!r} {values.shape} must be finite and of the grid's shape {grid.shape}")
        self.attributes = dict(attributes or {})
        if clash := set(self.attributes) & set(layout.OWN_ATTRIBUTES):
            raise DataError(f"attributes {sorted(clash)} belong to the store itself; choose other names")
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists already; remove it, choose another name, or ask to overwrite")
        self._partial = self.path.with_name(self.path.name + layout.PARTIAL_SUFFIX)
        self._file: h5py.File | None = None
        self._written = np.zeros(self.num_samples, dtype=bool)

    @property
    def num_samples(self) -> int:
        """T."""
        return len(next(iter(self.coords.values())))

    def __enter__(self) -> StoreWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            # How far a compressor gets is not known before; then only a disk that is full is an error.
            needed = self.num_samples * self._chunk_bytes() * (self.compression is None) + _FREE_MARGIN
            if free < needed:
                raise self._disk_full(f"it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")
            # Bounds: the 1.10 chunk index of a fixed shape is faster to write and to list than the older B-tree.
            # No chunk cache: whole chunks pass through it once and only pay for it.
            self._file = h5py.File(self._partial, "w", libver=("v110", "v110"), rdcc_nbytes=0)
            lay_out(self._file, self)
        except OSError as error:
            self._abandon()
            raise self._as_data_error(error) from error
        return self

    def write(self, first_row: int, values: np.ndarray) -> None:
        """Store samples ``first_row`` to ``first_row + n - 1``.

        Args:
            first_row: row of the first sample, from 0.
            values: [n, C, H, W], any float type, in the channels' units. Slabs of tens of MB are fastest.
        """
        assert self._file is not None, "a StoreWriter is used in a with statement"
        wanted = (len(self.channels), *self.grid.shape)
        if values.ndim != 4 or values.shape[1:] != wanted:
            raise DataError(f"{self.path}: a slab has shape {values.shape}, expected (n, {str(wanted)[1:]}")
        if first_row < 0 or first_row + len(values) > self.num_samples:
            raise DataError(
                f"{self.path}: rows {first_row} to {first_row + len(values) - 1} are not all within "
                f"0 to {self.num_samples - 1}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            slab = np.ascontiguousarray(values, dtype="<f4")
            # One sum is not finite as soon as one value is not; only then is the culprit looked for.
            suspicious = not np.isfinite(slab.sum())
        if suspicious:
            self._refuse_not_finite(first_row, slab, "are not finite in float32")
        stored = self._encode(first_row, values, slab)
        try:
            self._file[layout.FIELDS][first_row : first_row + len(slab)] = stored
        except (OSError, RuntimeError) as error:
            raise self._as_data_error(error) from error
        self._written[first_row : first_row + len(slab)] = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            if not self._written.all():
                missing = layout.describe_sample(self.coords, int(np.argmin(self._written)))
                raise DataError(
                    f"{self.path}: {int((~self._written).sum())} of {self.num_samples} samples were never written, "
                    f"the first is {missing}; nothing was kept"
                )
            assert self._file is not None
            self._file.close()
            _sync(self._partial)
            os.replace(self._partial, self.path)
            _sync(self.path.parent)
        except (OSError, RuntimeError) as failure:
            self._abandon()
            raise self._as_data_error(failure) from failure
        except DataError:
            self._abandon()
            raise

    def _encode(self, first_row: int, values: np.ndarray, slab: np.ndarray) -> np.ndarray:
        """[n, C, H, W] as it is to stand in the file, of physical values (as given, and in float32)."""
        if self._transformed:
            slab = slab.copy() if np.may_share_memory(slab, values) else slab  # the caller's memory stays as it is
            for place in self._transformed:
                slab[:, place] = apply(self.transforms[place], values[:, place])
            if not np.isfinite(slab[:, self._transformed]).all():
                ends = ", ".join(sorted({self.transforms[place] for place in self._transformed}))
                self._refuse_not_finite(first_row, slab, f"lie below the start of the transform {ends}")

        def describe(n: int, channel: int, i: int, j: int) -> str:
            return f"{self.path}: {self._describe_value(first_row + n, channel, i, j)}"

        return self.encoding.encode(slab, describe)

    def _describe_value(self, row: int, channel: int, i: int, j: int) -> str:
        sample = layout.describe_sample(self.coords, row)
        return f"{sample}, channel {self.channels[channel]!r}, lat {self.grid.lat[i]:g}, lon {self.grid.lon[j]:g}"

    def _chunk_bytes(self) -> int:
        height, width = self.grid.shape
        return len(self.channels) * height * width * self.encoding.stored_type.itemsize + layout.CHECKSUM_BYTES

    def _refuse_not_finite(self, first_row: int, slab: np.ndarray, what: str) -> None:
        finite = np.isfinite(slab)
        if finite.all():  # only the sum had overflowed
            return
        row, channel, i, j = (int(index) for index in np.argwhere(~finite)[0])
        raise DataError(
            f"{self.path}: {int((~finite).sum())} values {what}, the first at "
            f"{self._describe_value(first_row + row, channel, i, j)}; "
            "a store holds whole fields: fill or drop them before converting"
        )

    def _abandon(self) -> None:
        """Leave nothing behind. On a full disk HDF5 fails to flush at the first close and lets go at the second."""
        if self._file is not None:
            for _ in range(2):
                with contextlib.suppress(OSError, RuntimeError):
                    self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _disk_full(self, detail: str) -> DataError:
        return DataError(
            f"no space to write {self.path}: {detail}; free some or choose another folder. Nothing was left there"
        )

    def _as_data_error(self, error: Exception) -> DataError:
        reason = str(error)
        if "No space left" in reason or "errno = 28" in reason or "Disk quota" in reason:
            return self._disk_full("the disk or the quota is full")
        return DataError(f"cannot write {self.path}: {reason.splitlines()[0] if reason else error!r}")


def _choose(
    channels: list[str], dtype: str, encoding: Encoding | None, transforms: Sequence[str] | None
) -> tuple[Encoding, list[str]]:
    """What the writer was told, completed by what is known of its channels where that is needed."""
    check_type(dtype)
    if encoding is not None and dtype not in ("float32", encoding.dtype):
        raise DataError(f"dtype {dtype!r} and an encoding of {encoding.dtype} contradict each other; give one of them")
    if encoding is not None and len(encoding.scale) != len(channels):
        raise DataError(f"the encoding is of {len(encoding.scale)} channels, the store has {len(channels)}; make one of all")
    if encoding is not None or dtype == "float32":
        given = [NONE] * len(channels) if transforms is None else transforms
        return encoding or Encoding.identity(len(channels)), check_transforms(given, channels)
    from smoe_hpc.io.channels import known_channel

    known = []
    for name in channels:
        channel = known_channel(name)
        if channel is None:
            raise DataError(
                f"the bounds of channel {name!r} are not known, which {dtype} needs; "
                "give encoding=Encoding.of_bounds(dtype, low, high)"
            )
        known.append(channel)
    chosen = check_transforms([c.transform for c in known] if transforms is None else transforms, channels)
    for channel, transform in zip(known, chosen, strict=True):
        if channel.transform != transform:
            raise DataError(
                f"channel {channel.name!r} has known bounds after transform {channel.transform!r}, not {transform!r}; "
                "give that one, or encoding=Encoding.of_bounds(dtype, low, high)"
            )
    return Encoding.of_bounds(dtype, [c.low for c in known], [c.high for c in known]), chosen


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
