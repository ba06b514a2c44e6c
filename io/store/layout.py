"""What is where in a store's HDF5 file: the one page that writer and reader share.

A store is plain HDF5 with dimension scales, which netCDF-4 readers (xarray, ncdump) understand::

    fields     [sample or time, channel, lat, lon] float32, float16 or int16, one chunk a sample, fletcher32
    time       [time] int64 seconds since 1970-01-01        where samples are times, perhaps with member over it
    sample     [sample] int64 0, 1, 2, ...                  otherwise, with run, step, member over it
    channel, units [channel] text;  scale, offset [channel] float64: value = stored * scale + offset
    transform  [channel] text: none, or log:0.001 where the value is log(1 + x / 0.001) of x in the channel's units
    lat, lon   [lat], [lon] float64
    constants  [constant, lat, lon] float64, named by constant, typed by constant_dtype
    attributes smoe_hpc_store (version of this layout), grid, and those given to the writer (sources, converter, ...)

Nothing else is read: every variable is a plain dataset of the file itself (:mod:`smoe_hpc.io.access.contained`), and ``time``,
where it says its units and calendar, says these.

Version 1 had float32 and no transform. Chunks are written in order with HDF5's 1.10 chunk index, so that one read finds
the offset of every sample; they may be compressed (shuffled bytes first, then the compressor, the checksum last).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import require_regular
from smoe_hpc.io.access.faults import UnreadableError, fault_number, faults_of
from smoe_hpc.io.access.formats import way_to_a_store
from smoe_hpc.io.names import known_names

VERSION = 2
FIELDS = "fields"
VERSION_ATTRIBUTE = "smoe_hpc_store"
GRID_ATTRIBUTE = "grid"
OWN_ATTRIBUTES = (VERSION_ATTRIBUTE, GRID_ATTRIBUTE, "Conventions")
PARTIAL_SUFFIX = ".partial"
COORDINATES = ("time", "run", "step", "member")
TIME_UNITS = "seconds since 1970-01-01"
CALENDARS = ("proleptic_gregorian", "standard", "gregorian")
CHECKSUM_BYTES = 4
SYNTHETIC = "synthetic"
SUFFIX = ".h5"


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, without a file lock where the file system refuses one (a store never changes).

    Chunks are not cached: each passes once, and one that is asked for twice is to be checked twice.

    Raises:
        DataError: missing, half-written, truncated, no regular file, or no HDF5 at all.
        UnreadableError: the system does not give it.
    """
    if path.name.endswith(PARTIAL_SUFFIX):
        raise DataError(f"{path} is what a crash left of a store being written; remove it and write the store again")
    with faults_of(path):
        exists, is_folder = path.exists(), path.is_dir()
    if not exists:
        raise DataError(f"{path} does not exist; give a store file, or a folder of them")
    if is_folder:
        raise DataError(f"{path} is a directory; give one store file" + _stores_within(path))
    require_regular(path)
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
            raise DataError(f"{path} is not a store (no HDF5 file): {way_to_a_store(path)}") from error
        number = fault_number(error)
        if number is not None:
            raise UnreadableError(path, number) from error
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
            raise DataError(f"unknown sample coordinate {name!r}; {known_names(name, COORDINATES)}")
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
