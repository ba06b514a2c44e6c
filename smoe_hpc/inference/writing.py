"""Forecasts into a netCDF or Zarr file, piece by piece: whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoe_hpc.errors import DataError

if TYPE_CHECKING:
    import xarray

SUFFIXES = (".nc", ".zarr")
_TIMES = "seconds since 1970-01-01"


def check_output(path: Path, overwrite: bool = False) -> None:
    """See that a file can be written, before work begins.

    Raises:
        DataError: another ending, a folder that is not there or not writable, or a file that is there.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: forecasts are written as {' or '.join(SUFFIXES)}; give such a name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: its folder is missing or not writable; make it, or choose another")
    if os.path.lexists(path) and not overwrite:
        raise DataError(f"{path} is there; remove it, choose another name, or give --overwrite")


def write_forecasts(
    path: Path, pieces: Iterable[xarray.Dataset], *, overwrite: bool = False, done: Callable[[int], None] | None = None
) -> int:
    """Write Datasets that follow each other along their first dimension, as `TrainedModel.forecasts` gives them.

    Args:
        path: ends with ``.nc`` (netCDF 4) or ``.zarr``.
        pieces: at least one.
        overwrite: replace what is there, once the new file is whole.
        done: called with the number of starts written so far.

    Returns:
        Number of starts.

    Raises:
        DataError: it cannot be written; nothing is left of it.
    """
    check_output(path, overwrite)
    partial = path.with_name(f".{path.stem}.{os.urandom(6).hex()}.partial{path.suffix}")
    append = _append_zarr if path.suffix == ".zarr" else _append_netcdf
    count = 0
    try:
        for piece in pieces:
            append(partial, piece, count)
            count += next(iter(piece.sizes.values()))
            if done is not None:
                done(count)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); nothing is left of it") from error
    except ImportError as error:
        raise DataError(f"{path}: writing it needs {error.name or error}; pip install 'smoe-hpc[convert]'") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    return count


def _append_zarr(path: Path, piece: xarray.Dataset, count: int) -> None:
    along = next(iter(piece.sizes))
    if not count:
        piece.to_zarr(path, mode="w-", zarr_format=2, encoding=_encoding(piece, {}))
    else:
        piece.to_zarr(path, append_dim=along)


def _append_netcdf(path: Path, piece: xarray.Dataset, count: int) -> None:
    """The first piece makes the file, its first dimension without a limit; of others the values are added."""
    along = next(iter(piece.sizes))
    if not count:
        encoding = _encoding(piece, {"time": {"units": _TIMES, "dtype": "int64", "calendar": "proleptic_gregorian"}})
        piece.to_netcdf(path, engine="h5netcdf", unlimited_dims=[along], encoding=encoding)
        return
    import h5netcdf
    import numpy as np

    with h5netcdf.File(path, "a") as file:
        size = piece.sizes[along]
        file.resize_dimension(along, count + size)
        for name, variable in piece.variables.items():
            if along in variable.dims:
                values = variable.values
                if np.issubdtype(values.dtype, np.datetime64):
                    values = values.astype("datetime64[s]").astype(np.int64)
                file.variables[str(name)][count:] = values


def _encoding(piece: xarray.Dataset, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    fill = {
        str(name): {"_FillValue": None}
        for name, variable in piece.variables.items()
        if variable.dtype.kind != "f" or name in piece.coords
    }
    return {name: {**fill.get(name, {}), **known.get(name, {})} for name in {*fill, *known} if name in piece.variables}
