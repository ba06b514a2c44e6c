"""Writing a store: whole or not at all.

Samples are appended in slabs to ``<name>.partial``, which gets its final name only when every sample is there and on
the disk. So whatever stops the writer, a file under the final name can be trusted.

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
from smoe_hpc.io.grids import Grid

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
        coords: ``time`` [T] datetime64, or ``run``, ``step``, ``member`` [T] int; they set T.
        constants: name to [H, W], integers or floats.
        attributes: text and numbers kept with the file: sources, regridding, converter.
        overwrite: replace a store of the same name (at the moment of renaming) instead of refusing.

    Raises:
        DataError: broken arguments, a store already there, too little space; while writing: values that are not
            finite, a slab of another shape, a disk that is full; at the end: samples never written.
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
    ) -> None:
        self.path = Path(path)
        self.grid, self.channels, self.units = grid, list(channels), list(units)
        if not self.channels or len(set(self.channels)) != len(self.channels) or len(self.units) != len(self.channels):
            raise DataError(f"channels {self.channels} must be different names with one unit each, not {self.units}")
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
            needed = self.num_samples * self._chunk_bytes() + _FREE_MARGIN
            if free < needed:
                raise self._disk_full(f"it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")
            # Bounds: the 1.10 chunk index of a fixed shape is faster to write and to list than the older B-tree.
            # No chunk cache: whole chunks pass through it once and only pay for it.
            self._file = h5py.File(self._partial, "w", libver=("v110", "v110"), rdcc_nbytes=0)
            self._lay_out(self._file)
        except OSError as error:
            self._abandon()
            raise self._as_data_error(error) from error
        return self

    def write(self, first_row: int, values: np.ndarray) -> None:
        """Store samples ``first_row`` to ``first_row + n - 1``.

        Args:
            first_row: row of the first sample, from 0.
            values: [n, C, H, W], any float type; kept as float32. Slabs of tens of MB are fastest.
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
            slab = np.ascontiguousarray(values, dtype=layout.STORED_TYPE)
            # One sum is not finite as soon as one value is not; only then is the culprit looked for.
            suspicious = not np.isfinite(slab.sum())
        if suspicious:
            self._refuse_not_finite(first_row, slab)
        try:
            self._file[layout.FIELDS][first_row : first_row + len(slab)] = slab
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

    def _chunk_bytes(self) -> int:
        height, width = self.grid.shape
        return len(self.channels) * height * width * layout.STORED_TYPE.itemsize + layout.CHECKSUM_BYTES

    def _lay_out(self, file: h5py.File) -> None:
        samples, (height, width) = self.num_samples, self.grid.shape
        chunk = (1, len(self.channels), height, width)
        file.attrs.update({layout.VERSION_ATTRIBUTE: layout.VERSION, layout.GRID_ATTRIBUTE: self.grid.kind})
        file.attrs.update({"Conventions": "CF-1.10", **self.attributes})
        first = "time" if "time" in self.coords else "sample"
        if first == "sample":
            _variable(file, "sample", np.arange(samples), [], scale=True)
        for name, values in self.coords.items():
            along = [] if name == first else [first]
            variable = _variable(file, name, values.astype(np.int64), along, scale=name == first)
            if name == "time":
                variable.attrs.update({"units": layout.TIME_UNITS, "calendar": "proleptic_gregorian"})
        _variable(file, "channel", self.channels, [], scale=True)
        for name, values in (("lat", self.grid.lat), ("lon", self.grid.lon)):
            variable = _variable(file, name, values, [], scale=True)
            if self.grid.kind == "latlon":
                north = name == "lat"
                variable.attrs["units"] = "degrees_north" if north else "degrees_east"
                variable.attrs["standard_name"] = "latitude" if north else "longitude"
        _variable(file, "units", self.units, ["channel"])
        _variable(file, "scale", np.ones(len(self.channels)), ["channel"])
        _variable(file, "offset", np.zeros(len(self.channels)), ["channel"])
        if self.constants:
            _variable(file, "constant", list(self.constants), [], scale=True)
            _variable(file, "constant_dtype", [str(v.dtype) for v in self.constants.values()], ["constant"])
            _variable(file, "constants", np.stack([*self.constants.values()]).astype(float), ["constant", "lat", "lon"])
        fields = file.create_dataset(
            layout.FIELDS, (samples, *chunk[1:]), layout.STORED_TYPE, chunks=chunk, fletcher32=True
        )
        _attach(file, fields, [first, "channel", "lat", "lon"])

    def _refuse_not_finite(self, first_row: int, slab: np.ndarray) -> None:
        finite = np.isfinite(slab)
        if finite.all():  # only the sum had overflowed
            return
        row, channel, i, j = (int(index) for index in np.argwhere(~finite)[0])
        sample = layout.describe_sample(self.coords, first_row + row)
        raise DataError(
            f"{self.path}: {int((~finite).sum())} values are not finite in float32, the first at {sample}, "
            f"channel {self.channels[channel]!r}, lat {self.grid.lat[i]:g}, lon {self.grid.lon[j]:g}; "
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


def _variable(
    file: h5py.File, name: str, values: np.ndarray | Sequence[str], dims: list[str], scale: bool = False
) -> h5py.Dataset:
    """A small variable over the named dimensions; with ``scale`` it is itself a dimension."""
    if isinstance(values, np.ndarray):
        variable = file.create_dataset(name, data=values)
    else:
        variable = file.create_dataset(name, data=list(values), dtype=h5py.string_dtype())
    if scale:
        variable.make_scale(name)
    _attach(file, variable, dims)
    return variable


def _attach(file: h5py.File, variable: h5py.Dataset, dims: list[str]) -> None:
    for axis, dim in enumerate(dims):
        variable.dims[axis].attach_scale(file[dim])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
