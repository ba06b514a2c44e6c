"""What is where in a store's HDF5 file: the one page that writer and reader share.

A store is plain HDF5 with dimension scales, which netCDF-4 readers (xarray, ncdump) understand::

    fields     [sample or time, channel, lat, lon] float32, float16 or int16, one chunk a sample, fletcher32
    time       [time] int64 seconds since 1970-01-01        where samples are times, perhaps with member over it
    sample     [sample] int64 0, 1, 2, ...                  otherwise, with run, step, member over it
    channel, units [channel] text;  scale, offset [channel] float64: value = stored * scale + offset
    transform  [channel] text: none, or log:0.001 where the value is log(1 + x / 0.001) of x in the channel's units
    lat, lon   [lat], [lon] float64
    constants  [constant, lat, lon] float64, named by constant, typed by constant_dtype
    attributes smoe_hpc_store (version of this layout), grid, and what the writer was told (sources, converter, ...)

Version 1 had float32 and no transform. Chunks are written in order with HDF5's 1.10 chunk index, so that one read finds
the offset of every sample; they may be compressed (shuffled bytes first, then the compressor, the checksum last).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from smoe_hpc.errors import DataError

VERSION = 2
FIELDS = "fields"
VERSION_ATTRIBUTE = "smoe_hpc_store"
GRID_ATTRIBUTE = "grid"
OWN_ATTRIBUTES = (VERSION_ATTRIBUTE, GRID_ATTRIBUTE, "Conventions")
PARTIAL_SUFFIX = ".partial"
COORDINATES = ("time", "run", "step", "member")
TIME_UNITS = "seconds since 1970-01-01"
CHECKSUM_BYTES = 4
SYNTHETIC = "synthetic"
SUFFIX = ".h5"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name.

    >>> nearest("t2n", ["t2m", "z500"])
    "did you mean 't2m'? Known: t2m, z500"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    listing = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return (f"did you mean {close[0]!r}? " if close else "") + f"Known: {listing}"


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, without a file lock where the file system refuses one (a store never changes).

    Chunks are not cached: each passes once, and one that is asked for twice is to be checked twice.

    Raises:
        DataError: missing, half-written, truncated, or no HDF5 at all.
    """
    if path.name.endswith(PARTIAL_SUFFIX):
        raise DataError(f"{path} is what a crash left of a store being written; remove it and write the store again")
    if not path.exists():
        raise DataError(
            f"{path} does not exist; make it with `smoe-hpc data heat`, `smoe-hpc data synthesize` or "
            "`smoe-hpc data convert`"
        )
    if path.is_dir():
        raise DataError(f"{path} is a directory; give one store file" + _stores_within(path))
    try:
        try:
            return h5py.File(path, "r", rdcc_nbytes=0)
        except OSError as error:
            if "lock" not in str(error):
                raise
            return h5py.File(path, "r", rdcc_nbytes=0, locking=False)
    except OSError as error:
        reason = str(error)
        if "truncated" in reason:
            raise truncated(path) from error
        if "signature" in reason:
            raise DataError(f"{path} is not a store (no HDF5 file); convert it with `smoe-hpc data convert`") from error
        raise DataError(f"{path} cannot be opened: {reason}") from error


def truncated(path: Path) -> DataError:
    """The error about a file that ends before its data do."""
    return DataError(f"{path} is truncated: the file ends before its samples do; copy or write it again")


def _stores_within(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.h5"))
    return f", e.g. {', '.join(names[:5])}" if names else ""


def is_synthetic(attributes: Mapping[str, Any]) -> bool:
    """Whether fields were made up: their writer set ``synthetic``, or says so where it names its sources.

    >>> is_synthetic({"sources": "synthetic: heat diffusion"}), is_synthetic({"sources": "ERA5"})
    (True, False)
    """
    return bool(attributes.get(SYNTHETIC, False)) or str(attributes.get("sources", "")).startswith(SYNTHETIC)


def describe_sample(coords: dict[str, np.ndarray], row: int) -> str:
    """Name a sample the way people do.

    >>> describe_sample({"run": np.array([3, 3]), "step": np.array([0, 1])}, 1)
    'run 3, step 1'
    >>> describe_sample({"time": np.array(["2019-03-01T06"], "datetime64[s]")}, 0)
    'time 2019-03-01T06:00:00'
    """
    return ", ".join(f"{name} {values[row]}" for name, values in coords.items())


def check_coords(coords: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Coordinates of the samples: ``time`` as seconds, the others as int64, all of one length.

    Raises:
        DataError: none, an unknown one, unequal lengths, or times that do not strictly ascend.
    """
    if not coords:
        raise DataError(f"a store needs coordinates for its samples: {', '.join(COORDINATES)}")
    checked = {}
    for name, values in coords.items():
        if name not in COORDINATES:
            raise DataError(f"unknown sample coordinate {name!r}; {nearest(name, COORDINATES)}")
        checked[name] = np.asarray(values).astype("datetime64[s]" if name == "time" else np.int64)
    lengths = {name: values.shape for name, values in checked.items()}
    if len(set(lengths.values())) > 1 or len(next(iter(lengths.values()))) != 1:
        raise DataError(f"sample coordinates must be rows of one length, not {lengths}")
    time = checked.get("time")
    if time is not None and len(time) > 1:
        _check_times(checked, time)
    return checked


def _check_times(coords: dict[str, np.ndarray], time: np.ndarray) -> None:
    """No sample comes twice, and times ascend: strictly alone, without going back where each has members."""
    order = np.lexsort([values for name, values in coords.items() if name != "time"] + [time])
    same = np.ones(len(time) - 1, dtype=bool)
    for values in coords.values():
        same &= np.diff(values[order].astype(np.int64)) == 0
    if same.any():
        twice = describe_sample(coords, int(order[np.argmax(same)]))
        raise DataError(f"times must strictly ascend, but {twice.removeprefix('time ')} appears twice; drop one of them")
    back = np.diff(time) < np.timedelta64(0)
    if back.any() and set(coords) <= {"time", "member"}:  # forecasts, named by run and step too, overlap in time
        where = int(np.argmax(back))
        raise DataError(f"times must strictly ascend, but {time[where]} is followed by {time[where + 1]}; sort them")
