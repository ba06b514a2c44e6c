"""A store as xarray sees it, for people who look at data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.store.layout import FIELDS
from smoe_hpc.io.store.multi_file import Fields, open_store
from smoe_hpc.io.store.transforms import NONE, undo

if TYPE_CHECKING:
    import xarray

_DEGREES = {
    "lat": {"units": "degrees_north", "standard_name": "latitude"},
    "lon": {"units": "degrees_east", "standard_name": "longitude"},
}


def open_dataset(path: str | Path) -> xarray.Dataset:
    """A store, a folder of stores or a pattern as an ``xarray.Dataset`` of physical values, read on access.

    ``fields`` [sample or time, channel, lat, lon] is float32 in the channels' units (``units`` over channel): decoded,
    and with transforms undone. Samples are named by ``time``, or by ``run``, ``step`` and ``member``. What is stored as
    it is stored: ``xarray.open_dataset(file, engine="h5netcdf")``.

    Raises:
        DataError: missing or damaged file, not a store, or xarray not installed.
    """
    store = open_store(path)
    try:
        import xarray
        from xarray.core.indexing import LazilyIndexedArray
    except ImportError as error:
        raise DataError("xarray is needed to look at a store; pip install 'smoe-hpc[convert]'") from error
    first = "time" if "time" in store.coords else "sample"
    degrees = _DEGREES if store.grid.kind == "latlon" else {"lat": {}, "lon": {}}
    coords: dict[str, Any] = {
        "channel": store.channels,
        "lat": ("lat", store.grid.lat, degrees["lat"]),
        "lon": ("lon", store.grid.lon, degrees["lon"]),
        "units": ("channel", store.units),
    }
    if first == "sample":
        coords["sample"] = np.arange(store.num_samples)
    coords |= {name: (first, values) for name, values in store.coords.items()}
    fields = xarray.Variable((first, "channel", "lat", "lon"), LazilyIndexedArray(_lazy(store)))
    variables: dict[str, Any] = {FIELDS: fields}
    if store.constants:
        coords["constant"] = list(store.constants)
        stacked = np.stack([values.astype(np.float64) for values in store.constants.values()])
        variables["constants"] = (("constant", "lat", "lon"), stacked)
    dataset = xarray.Dataset(variables, coords, store.attributes)
    dataset.set_close(store.close)
    return dataset


def _lazy(store: Fields) -> Any:
    """The fields as an array that xarray reads piece by piece."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class _Fields(BackendArray):
        shape = (store.num_samples, len(store.channels), *store.grid.shape)
        dtype = np.dtype(np.float32)

        def __getitem__(self, key: Any) -> np.ndarray:
            support = indexing.IndexingSupport.OUTER
            return indexing.explicit_indexing_adapter(key, self.shape, support, lambda outer: _read(store, outer))

    return _Fields()


def _read(store: Fields, key: tuple[Any, ...]) -> np.ndarray:
    """Physical values at whole numbers, slices or arrays of numbers along each of the four dimensions."""
    sizes = (store.num_samples, len(store.channels), *store.grid.shape)
    rows, indices, lat, lon = (np.atleast_1d(np.arange(size)[part]) for size, part in zip(sizes, key, strict=True))
    names = [store.channels[index] for index in indices.tolist()]
    transforms = [store.transforms[index] for index in indices.tolist()]
    found = np.empty((len(rows), len(indices), len(lat), len(lon)), dtype=np.float32)
    for n, row in enumerate(rows.tolist()):  # one whole sample in memory at a time
        found[n] = store.read([row], names)[0][:, lat][:, :, lon]
    for index, transform in enumerate(transforms):
        if transform != NONE:
            found[:, index] = undo(transform, found[:, index])
    return found[tuple(0 if isinstance(part, (int, np.integer)) else slice(None) for part in key)]
