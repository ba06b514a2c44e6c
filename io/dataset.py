"""A store as xarray sees it, for people who look at data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smoe_hpc.errors import DataError
from smoe_hpc.io.layout import FIELDS, open_hdf5

if TYPE_CHECKING:
    import xarray


def open_dataset(path: str | Path) -> xarray.Dataset:
    """A store as an ``xarray.Dataset`` with decoded values, read when they are looked at.

    ``fields`` [sample or time, channel, lat, lon] is in the channels' units (``units`` over channel); samples are named
    by ``time``, or by ``run``, ``step`` and ``member``.

    Raises:
        DataError: missing or damaged file, not a store, or xarray and h5netcdf not installed.
    """
    with open_hdf5(Path(path)) as file:
        if FIELDS not in file:
            raise DataError(f"{path} is HDF5 but not a store; open it with xarray.open_dataset itself")
    try:
        import h5netcdf  # noqa: F401
        import xarray
    except ImportError as error:
        raise DataError("xarray and h5netcdf are needed to look at a store; pip install 'smoe-hpc[convert]'") from error
    dataset = xarray.open_dataset(path, engine="h5netcdf")
    dataset = dataset.set_coords([name for name in ("run", "step", "member", "units") if name in dataset])
    scale, offset = dataset["scale"], dataset["offset"]
    if (scale != 1).any() or (offset != 0).any():
        dataset[FIELDS] = dataset[FIELDS] * scale + offset
    return dataset.drop_vars(["scale", "offset", "constant_dtype"], errors="ignore")
