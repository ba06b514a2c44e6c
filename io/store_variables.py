"""The variables of a new store file, before its fields are written: :mod:`smoe_hpc.io.layout` says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import h5py
import numpy as np

from smoe_hpc.io import layout

if TYPE_CHECKING:
    from smoe_hpc.io.store_writer import StoreWriter


def lay_out(file: h5py.File, writer: StoreWriter) -> None:
    """Write everything but the fields, and make room for these: one chunk a sample, [T, C, H, W]."""
    samples, grid, channels = writer.num_samples, writer.grid, writer.channels
    file.attrs.update({layout.VERSION_ATTRIBUTE: layout.VERSION, layout.GRID_ATTRIBUTE: grid.kind})
    file.attrs.update({"Conventions": "CF-1.10", **writer.attributes})
    first = "time" if "time" in writer.coords else "sample"
    if first == "sample":
        _variable(file, "sample", np.arange(samples), [], scale=True)
    for name, values in writer.coords.items():
        along = [] if name == first else [first]
        variable = _variable(file, name, values.astype(np.int64), along, scale=name == first)
        if name == "time":
            variable.attrs.update({"units": layout.TIME_UNITS, "calendar": "proleptic_gregorian"})
    _variable(file, "channel", channels, [], scale=True)
    for name, values in (("lat", grid.lat), ("lon", grid.lon)):
        variable = _variable(file, name, values, [], scale=True)
        if grid.kind == "latlon":
            north = name == "lat"
            variable.attrs["units"] = "degrees_north" if north else "degrees_east"
            variable.attrs["standard_name"] = "latitude" if north else "longitude"
    _variable(file, "units", writer.units, ["channel"])
    _variable(file, "scale", writer.encoding.scale, ["channel"])
    _variable(file, "offset", writer.encoding.offset, ["channel"])
    _variable(file, "transform", writer.transforms, ["channel"])
    constants = writer.constants
    if constants:
        _variable(file, "constant", list(constants), [], scale=True)
        _variable(file, "constant_dtype", [str(v.dtype) for v in constants.values()], ["constant"])
        _variable(file, "constants", np.stack([*constants.values()]).astype(float), ["constant", "lat", "lon"])
    shape = (len(channels), *grid.shape)
    fields = file.create_dataset(
        layout.FIELDS,
        (samples, *shape),
        writer.encoding.stored_type,
        chunks=(1, *shape),
        fletcher32=True,
        **writer.filters,
    )
    _attach(file, fields, [first, "channel", "lat", "lon"])


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
