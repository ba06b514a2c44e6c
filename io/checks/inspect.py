"""What a store holds, for people and scripts (``smoe-hpc data inspect``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.io.access import contained
from smoe_hpc.io.sampling.gaps import find_gaps, usual_step
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.chunks import filter_names
from smoe_hpc.io.store.index import INDEX, read_index
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.io.store.multi_file import Series, open_store
from smoe_hpc.io.store.reader import Store
from smoe_hpc.io.store.transforms import NONE

SYNTHETIC = "YES: these fields were made up, they are not observations"
_SHOWN_GAPS = 5


def describe_store(path: str | Path) -> dict[str, Any]:
    """Plain values (text, numbers, lists, dicts) that can be printed or written as JSON; no field is read.

    Args:
        path: a store file, a folder of them or a pattern.

    Returns:
        ``path``, ``synthetic`` (only where it is), ``bytes``, ``files`` and ``index`` (of a folder), ``grid``,
        ``samples`` (how many, and their times with step and gaps, or their runs and steps), ``channels`` (name to
        units), ``transforms`` and ``ranges`` (where there are any), ``constants``, ``storage`` and ``attributes``.

    Raises:
        DataError: missing or damaged file, not a store, files that do not belong together.
    """
    path = Path(path)
    store = open_store(path)
    stores = store.stores if isinstance(store, Series) else [store]
    described: dict[str, Any] = {"path": str(path)}
    if layout.is_synthetic(store.attributes) or any(layout.is_synthetic(one.attributes) for one in stores):
        described["synthetic"] = SYNTHETIC
    described["bytes"] = sum(one.stamp[0] for one in stores)
    if path.is_dir() or len(stores) > 1:
        described["files"] = [one.path.name for one in stores]
    if path.is_dir():
        described["index"] = f"{INDEX}, sizes as it says" if read_index(path) else "none"
    described |= {
        "grid": store.grid.describe(),
        "samples": {"count": store.num_samples, **_describe_coords(store.coords)},
        "channels": dict(zip(store.channels, store.units, strict=True)),
    }
    transforms = {n: t for n, t in zip(store.channels, store.transforms, strict=True) if t != NONE}
    if transforms:
        described["transforms"] = transforms
    if not store.encoding.is_identity:
        described["ranges"] = _describe_ranges(store)
    described["constants"] = list(store.constants)
    described["storage"] = _describe_storage(store, stores)
    described["attributes"] = {name: _plain(value) for name, value in store.attributes.items()}
    return described


def _describe_storage(store: FieldReader, stores: list[Store]) -> dict[str, Any]:
    compressions, checksums = set(), True
    for one in stores:
        with layout.open_hdf5(one.path) as file:
            fields = contained.dataset(one.path, file, layout.FIELDS)
            names, chunk = filter_names(fields), list(fields.chunks or ())
        compressions.add(" ".join(name for name in names if name not in ("shuffle", "fletcher32")) or "none")
        checksums &= one.has_checksums
    return {
        "type": store.encoding.dtype,
        "chunk": chunk,
        "compression": ", ".join(sorted(compressions)),
        "checksums": checksums,
        "read": "at file offsets" if store.direct else "through HDF5",
    }


def _describe_ranges(store: FieldReader) -> dict[str, str]:
    """What each channel can hold, in stored space, and how finely."""
    encoding = store.encoding
    described = {}
    for name, low, high, scale in zip(store.channels, encoding.low, encoding.high, encoding.scale, strict=True):
        steps = f"in steps of {scale:.3g}" if encoding.dtype == "int16" else "to 11 significant bits around its offset"
        described[name] = f"{low:.6g} to {high:.6g} {steps}"
    return described


def _describe_coords(coords: dict[str, np.ndarray]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name, values in coords.items():
        if not len(values):
            continue
        if name != "time":
            different = len(np.unique(values))
            described[name] = {"first": int(values.min()), "last": int(values.max()), "different": different}
            continue
        described[name] = {"first": str(values[0]), "last": str(values[-1])}
        usual = usual_step(values)
        if usual is not None:
            gaps = find_gaps(values)
            described[name].update({"step_hours": usual / 3600, "gaps": len(gaps)})
            if gaps:
                described[name]["first_gaps_end"] = [gap.after for gap in gaps[:_SHOWN_GAPS]]
            off = [str(gap) for gap in gaps if not gap.missing]
            if off:
                described[name]["off_step"] = off[:_SHOWN_GAPS]
    return described


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
