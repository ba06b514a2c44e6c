"""The variables of a store file beside its fields, written and read: :mod:`smoe_hpc.io.store.layout` says what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.access import contained
from smoe_hpc.io.access.formats import way_to_a_store
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.contents import Contents
from smoe_hpc.io.store.encoding import STORED_TYPES, Encoding
from smoe_hpc.io.store.transforms import NONE, check_transforms

_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}


def write_variables(file: h5py.File, contents: Contents, filters: Mapping[str, object]) -> None:
    """Write everything but the fields, and make room for these: one chunk a sample, [T, C, H, W].

    Args:
        file: new.
        contents: what is written.
        filters: of the fields, as h5py takes them.
    """
    samples, grid, channels = contents.num_samples, contents.grid, contents.channels
    file.attrs.update({layout.VERSION_ATTRIBUTE: layout.VERSION, layout.GRID_ATTRIBUTE: grid.kind})
    file.attrs.update({"Conventions": "CF-1.10", **contents.attributes})
    first = "time" if "time" in contents.coords else "sample"
    if first == "sample":
        _variable(file, "sample", np.arange(samples), [], scale=True)
    for name, values in contents.coords.items():
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
    _variable(file, "units", contents.units, ["channel"])
    _variable(file, "scale", contents.encoding.scale, ["channel"])
    _variable(file, "offset", contents.encoding.offset, ["channel"])
    _variable(file, "transform", contents.transforms, ["channel"])
    constants = contents.constants
    if constants:
        _variable(file, "constant", list(constants), [], scale=True)
        _variable(file, "constant_dtype", [str(v.dtype) for v in constants.values()], ["constant"])
        _variable(file, "constants", np.stack([*constants.values()]).astype(float), ["constant", "lat", "lon"])
    shape = (len(channels), *grid.shape)
    fields = file.create_dataset(
        layout.FIELDS,
        (samples, *shape),
        contents.encoding.stored_type,
        chunks=(1, *shape),
        fletcher32=True,
        **filters,
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


def read_contents(path: Path, file: h5py.File) -> Contents:
    """What a file says that it holds, everything but the fields.

    Raises:
        DataError: not a store, one made by a later version, or one whose parts do not fit together or lie in other files.
        KeyError: a variable is missing.
    """
    _require_store(path, file)
    fields = file[layout.FIELDS]
    channels, units = contained.texts(path, file, "channel"), contained.texts(path, file, "units")
    row = {name: contained.numbers(path, file, name, 1) for name in ("lat", "lon", "scale", "offset")}
    transforms = [NONE] * len(channels)
    if contained.has(file, "transform"):
        transforms = contained.texts(path, file, "transform")
    coords = _read_coords(path, file)
    try:
        grid = Grid(str(contained.attribute(path, file, layout.GRID_ATTRIBUTE)), row["lat"], row["lon"])
        encoding = Encoding(_NAMES[fields.dtype], row["scale"], row["offset"])
        transforms = check_transforms(transforms, channels)
        coords = layout.check_coords(coords)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    constants = _read_constants(path, file, grid.shape)
    attributes = contained.attributes(path, file, layout.OWN_ATTRIBUTES)
    contents = Contents(path, grid, channels, units, coords, constants, attributes, encoding, transforms)
    expected = (contents.num_samples, len(channels), *grid.shape)
    if fields.shape != expected or not len(units) == len(encoding.scale) == len(channels):
        raise DataError(f"{path}: fields are {fields.shape} but their names say {expected}; write the store again")
    if len(set(channels)) != len(channels):
        raise DataError(f"{path}: channels {channels} are not all different; write the store again")
    return contents


def _require_store(path: Path, file: h5py.File) -> None:
    """Raise unless a file is a store of a version that is known, whose fields have a type and a shape that stores have."""
    version = contained.attribute(path, file, layout.VERSION_ATTRIBUTE)
    if version is None or not contained.has(file, layout.FIELDS):
        raise DataError(f"{path} is HDF5 but not a store: {way_to_a_store(path)}")
    if not isinstance(version, np.integer):
        raise DataError(f"{path} is a store of version {version!r}, which is not a whole number; write it again")
    if int(version) > layout.VERSION:
        raise DataError(f"{path} is a store of version {version}; this smoe-hpc is older: update it")
    contained.require_contained(path, file, layout.FIELDS)
    fields = file[layout.FIELDS]
    if fields.dtype not in _NAMES:
        types = ", ".join(STORED_TYPES)
        raise DataError(f"{path} holds {fields.dtype}; a store holds {types}: write it again in one of them")
    if fields.ndim != 4:
        raise DataError(f"{path}: fields are {fields.shape}, not (samples, channels, rows, columns); write it again")


def _read_coords(path: Path, file: h5py.File) -> dict[str, np.ndarray]:
    """The coordinates of the samples that a file has, [T] integers each.

    Raises:
        DataError: other values, or times that are counted from elsewhere or by another calendar.
    """
    names = [name for name in layout.COORDINATES if contained.has(file, name)]
    coords = {name: contained.numbers(path, file, name, 1, whole=True) for name in names}
    if "time" in coords:
        time = contained.dataset(path, file, "time")
        units, calendar = (contained.attribute(path, time, name) for name in ("units", "calendar"))
        if units is not None and units != layout.TIME_UNITS:
            raise DataError(f"{path}: times are in {units!r}, a store's in {layout.TIME_UNITS!r}; write the store again")
        if calendar is not None and calendar not in layout.CALENDARS:
            raise DataError(
                f"{path}: times are of the calendar {calendar!r}, whose days are not those of a store "
                f"({', '.join(layout.CALENDARS)}); convert them, or leave out what has no such day"
            )
    return coords


def _read_constants(path: Path, file: h5py.File, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The constants of a file: name to [H, W] of the type that it names, finite.

    Raises:
        DataError: names, types and values that do not fit together.
    """
    if not contained.has(file, "constants"):
        return {}
    names, types = (contained.texts(path, file, name) for name in ("constant", "constant_dtype"))
    values = contained.numbers(path, file, "constants", 3)
    if values.shape != (len(names), *shape) or len(types) != len(names) or len(set(names)) != len(names):
        raise DataError(
            f"{path}: constants are {values.shape}, but there are {len(set(names))} names, {len(types)} types and a grid of "
            f"{shape}; write the store again"
        )
    return {name: _as_constant(path, name, kind, field) for name, kind, field in zip(names, types, values, strict=True)}


def _as_constant(path: Path, name: str, kind: str, values: np.ndarray) -> np.ndarray:
    try:
        wanted = np.dtype(kind)
    except (TypeError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: constant {name!r} is of type {kind[:40]!r}, which is none; write the store again") from error
    with np.errstate(invalid="ignore"):
        if wanted.kind not in "iufb" or not np.isfinite(values).all() or not np.array_equal(values.astype(wanted), values):
            raise DataError(
                f"{path}: constant {name!r} does not hold finite numbers of the type that it names, {wanted}; "
                "write the store again"
            )
        return values.astype(wanted)
