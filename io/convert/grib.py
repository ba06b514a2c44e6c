"""GRIB files of surface fields on a regular latitude-longitude grid, as the Climate Data Store delivers them.

Read message by message through xarray and cfgrib, without the index file that cfgrib likes to leave beside its source.
Rows are turned south to north, columns west to east from 0; a region that crosses Greenwich goes on past 360 (10W..2E
becomes 350..362), because a store must keep neighbours side by side and a filter must not see an edge at Greenwich.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import require_regular
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.progress import Progress

if TYPE_CHECKING:
    import xarray

CONVERTER = "smoe-hpc grib 1"
_SLAB_BYTES = 32 << 20


def convert_grib(
    source: str | Path,
    destination: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a store with one sample a time and one channel a variable (``t2m``, ``tp``, ...), units as in the file.

    Times are valid times, whatever their step; gaps stay gaps. Attributes keep the source's name, the institution, the
    converter and what was done to the grid.

    Args:
        source: the GRIB file (edition 1 or 2).
        destination: the store to be written.
        overwrite: replace a store of that name.
        progress: called with (times done, times in all).

    Returns:
        ``destination``.

    Raises:
        DataError: cfgrib missing, not GRIB, levels or members or another grid type, variables with different times or
            grids, times that repeat, missing values (naming time, channel and point), no space.
    """
    source, destination = Path(source), Path(destination)
    fields = _open(source)
    first = next(iter(fields.values()))
    times = np.atleast_1d(first["valid_time"].values).astype("datetime64[s]")
    rows, columns, grid = arrange(first["latitude"].values, first["longitude"].values)
    order = np.argsort(times, kind="stable")
    attributes = {
        "sources": source.name,
        "institution": str(first.attrs.get("institution", "")),
        "converter": CONVERTER,
        "regridding": "none; rows south to north, columns west to east",
    }
    height, width = grid.shape
    slab = max(1, _SLAB_BYTES // (4 * len(fields) * height * width))
    units = [str(field.attrs.get("units", "unknown")) for field in fields.values()]
    with StoreWriter(
        destination,
        grid,
        list(fields),
        units,
        coords={"time": times[order]},
        attributes=attributes,
        overwrite=overwrite,
    ) as writer:
        for start in range(0, len(order), slab):
            some = order[start : start + slab]
            values = np.stack([_values(field, some) for field in fields.values()], axis=1)
            writer.write(start, values[:, :, rows][..., columns])
            if progress is not None:
                progress(start + len(some), len(order))
    return destination


def arrange(latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray, Grid]:
    """How to index rows and columns so that they fit :class:`~smoe_hpc.io.grids.Grid`, and that grid.

    Longitudes are cut where they leave the widest gap, so that a region stays in one piece; a grid that goes all the
    way round is cut at 0.

    Raises:
        DataError: points that no order makes a grid.

    >>> rows, columns, grid = arrange(np.array([52.0, 51.0]), np.array([-1.0, 0.0, 1.0]))
    >>> rows.tolist(), columns.tolist(), grid.lon.tolist()
    ([1, 0], [0, 1, 2], [359.0, 360.0, 361.0])
    >>> arrange(np.array([0.0]), np.array([-180.0, -90.0, 0.0, 90.0]))[2].lon.tolist()
    [0.0, 90.0, 180.0, 270.0]
    """
    rows = np.argsort(latitude, kind="stable")
    turned = np.mod(np.round(np.asarray(longitude, dtype=np.float64), 9), 360.0)
    columns = np.argsort(turned, kind="stable")
    east = turned[columns]
    gaps = np.diff(east, append=east[0] + 360.0)
    cut = int(np.argmax(gaps)) + 1
    if cut < len(east) and gaps.max() > 1.5 * np.median(gaps):
        columns = np.roll(columns, -cut)
        east = np.roll(east, -cut)
        east = np.where(east < east[0], east + 360.0, east)
    return rows, columns, Grid("latlon", np.asarray(latitude, dtype=np.float64)[rows], east)


def _open(source: Path) -> dict[str, xarray.DataArray]:
    """Variables by name, [time, latitude, longitude] each, not read yet."""
    if not source.exists():
        raise DataError(f"{source} does not exist; give the GRIB file to convert")
    require_regular(source)
    try:
        import cfgrib
    except (ImportError, RuntimeError) as error:  # cfgrib raises RuntimeError where ecCodes itself is missing
        raise DataError("cfgrib and ecCodes are needed to read GRIB; pip install 'smoe-hpc[convert]'") from error
    try:
        # errors="raise": the default leaves out what it cannot read, and fields would be missing unseen.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # cfgrib's, about how it asks xarray to merge
            datasets = cfgrib.open_datasets(source, backend_kwargs={"indexpath": "", "errors": "raise"})
    except Exception as error:  # cfgrib raises whatever its layers raise
        raise DataError(f"{source} cannot be read as GRIB: {error}; is it complete? Download it again") from error
    fields: dict[str, xarray.DataArray] = {}
    for dataset in datasets:
        for name, field in dataset.data_vars.items():
            if name in fields:
                raise DataError(
                    f"{source}: variable {name!r} comes at several levels or steps; extract one first (grib_copy -w)"
                )
            fields[str(name)] = field.assign_attrs(institution=dataset.attrs.get("institution", ""))
    if not fields:
        raise DataError(f"{source} holds no field; is it complete? Download it again")
    for name in fields:
        _check(source, name, fields)
    return fields


def _check(source: Path, name: str, fields: dict[str, xarray.DataArray]) -> None:
    field, (first_name, first) = fields[name], next(iter(fields.items()))
    grid_type = field.attrs.get("GRIB_gridType")
    if grid_type != "regular_ll":
        raise DataError(f"{source}: {name!r} stands on a {grid_type} grid; interpolate it to a regular lat-lon grid first")
    extra = [dim for dim in field.dims if dim not in ("time", "latitude", "longitude")]
    if extra:
        sizes = ", ".join(f"{field.sizes[dim]} of {dim}" for dim in extra)
        raise DataError(
            f"{source}: {name!r} has {sizes} beside time, latitude and longitude; only surface fields are converted: "
            "extract one level, step and member first (grib_copy -w)"
        )
    for axis in ("valid_time", "latitude", "longitude"):
        if not np.array_equal(field[axis].values, first[axis].values):
            raise DataError(f"{source}: {name!r} and {first_name!r} differ in {axis}; convert them from files of their own")


def _values(field: xarray.DataArray, times: np.ndarray) -> np.ndarray:
    """[n, H, W] at the given indices along time."""
    if "time" not in field.dims:
        return field.values[None]
    return field.isel(time=times).transpose("time", "latitude", "longitude").values
