"""Writing a store: whole or not at all.

Samples are appended in slabs to ``<name>.partial``, which gets its final name only when every sample is there and on
the disk. So whatever stops the writer, a file under the final name can be trusted. The writer takes physical values;
transforms, scales and offsets are its own business (:mod:`smoe_hpc.io.store.contents`).

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
from smoe_hpc.files.regular import require_regular
from smoe_hpc.files.writing import sync
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.chunks import compression_options
from smoe_hpc.io.store.contents import Contents, choose_encoding, require_channels
from smoe_hpc.io.store.encoding import Encoding
from smoe_hpc.io.store.times import written_coords
from smoe_hpc.io.store.unfinished import hold
from smoe_hpc.io.store.variables import write_variables

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
        coords: ``time`` [T] datetime64 of any unit or datetime objects, whole seconds of the standard calendar, perhaps
            with ``member`` [T] int; or ``run``, ``step``, ``member`` [T] int. They set T.
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
        DataError: invalid arguments, times that are numbers, missing or of another calendar, a store already there or being
            written by another process, something else than a file where it is written, too little space; while
            writing: values that are not finite or outside what the encoding holds, a slab of another shape, a disk that
            is full; at the end: samples never written.
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
        require_channels(channels, units)
        chosen = choose_encoding(channels, dtype, encoding, transforms)
        self._compression, self._filters = compression, compression_options(compression)
        times = layout.check_coords(written_coords(coords))
        fixed = {name: np.asarray(values) for name, values in (constants or {}).items()}
        self._contents = Contents(self.path, grid, list(channels), list(units), times, fixed, dict(attributes or {}), *chosen)
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists already; remove it, choose another name, or ask to overwrite")
        self._partial = self.path.with_name(self.path.name + layout.PARTIAL_SUFFIX)
        self._file: h5py.File | None = None
        self._lock: int | None = None
        self._written = np.zeros(self._contents.num_samples, dtype=bool)

    def __enter__(self) -> StoreWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            # How far a compressor gets is not known before; then only a disk that is full is an error.
            fields = self._contents.num_samples * self._contents.sample_bytes
            needed = fields * (self._compression is None) + _FREE_MARGIN
            if free < needed:
                raise self._disk_full(f"it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")
            self._require_own_partial()
            self._lock = hold(self._partial, self.path)
            # Bounds: the 1.10 chunk index of a fixed shape is faster to write and to list than the older B-tree.
            # No chunk cache: whole chunks pass through it once and only pay for it.
            self._file = h5py.File(self._partial, "w", libver=("v110", "v110"), rdcc_nbytes=0, locking=False)
            write_variables(self._file, self._contents, self._filters)
        except OSError as error:
            self._abandon()
            raise self._as_data_error(error) from error
        return self

    def _require_own_partial(self) -> None:
        """Raise unless what a crash left under the name that is written to is a file, and no way to another."""
        if self._partial.is_symlink():
            raise DataError(f"{self._partial} is a link, and writing would change the file that it leads to; remove it")
        if self._partial.exists():
            require_regular(self._partial)

    def write(self, first_row: int, values: np.ndarray) -> None:
        """Store samples ``first_row`` to ``first_row + n - 1``.

        Args:
            first_row: row of the first sample, from 0.
            values: [n, C, H, W], any float type, in the channels' units. Slabs of tens of MB are fastest.
        """
        assert self._file is not None, "a StoreWriter is used in a with statement"
        contents = self._contents
        wanted = (len(contents.channels), *contents.grid.shape)
        if values.ndim != 4 or values.shape[1:] != wanted:
            raise DataError(f"{self.path}: a slab has shape {values.shape}, expected (n, {str(wanted)[1:]}")
        if first_row < 0 or first_row + len(values) > contents.num_samples:
            raise DataError(
                f"{self.path}: rows {first_row} to {first_row + len(values) - 1} are not all within "
                f"0 to {contents.num_samples - 1}"
            )
        stored = contents.encode(first_row, values)
        try:
            self._file[layout.FIELDS][first_row : first_row + len(stored)] = stored
        except (OSError, RuntimeError) as error:
            raise self._as_data_error(error) from error
        self._written[first_row : first_row + len(stored)] = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            if not self._written.all():
                missing = layout.describe_sample(self._contents.coords, int(np.argmin(self._written)))
                raise DataError(
                    f"{self.path}: {int((~self._written).sum())} of {len(self._written)} samples were never written, "
                    f"the first is {missing}; nothing was kept"
                )
            assert self._file is not None
            self._file.close()
            sync(self._partial)
            os.replace(self._partial, self.path)
            self._let_go()
            sync(self.path.parent)
        except (OSError, RuntimeError) as failure:
            self._abandon()
            raise self._as_data_error(failure) from failure
        except DataError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Leave nothing behind. On a full disk HDF5 fails to flush at the first close and lets go at the second."""
        if self._file is not None:
            for _ in range(2):
                with contextlib.suppress(OSError, RuntimeError):
                    self._file.close()
        if self._lock is not None:  # or else it is another writer's
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _disk_full(self, detail: str) -> DataError:
        return DataError(f"no space to write {self.path}: {detail}; free some or choose another folder. Nothing was left there")

    def _as_data_error(self, error: Exception) -> DataError:
        reason = str(error)
        if "No space left" in reason or "errno = 28" in reason or "Disk quota" in reason:
            return self._disk_full("the disk or the quota is full")
        return DataError(f"cannot write {self.path}: {reason.splitlines()[0] if reason else error!r}")
