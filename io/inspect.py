"""What a store holds, for people and scripts (``smoe-hpc data inspect``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.io.layout import FIELDS, open_hdf5
from smoe_hpc.io.store import Store


def describe_store(path: str | Path) -> dict[str, Any]:
    """Plain values (text, numbers, lists, dicts) that can be printed or written as JSON; no field is read.

    Returns:
        ``path``, ``bytes``, ``grid``, ``samples`` (how many, and their times with step and gaps, or their runs and
        steps), ``channels`` (name to units), ``constants``, ``storage`` and ``attributes``.

    Raises:
        DataError: missing or damaged file, not a store.
    """
    path = Path(path)
    store = Store(path)
    with open_hdf5(path) as file:
        fields = file[FIELDS]
        storage = {
            "type": str(fields.dtype),
            "chunk": list(fields.chunks or ()),
            "compression": fields.compression or "none",
            "checksums": bool(fields.fletcher32),
            "read": "at file offsets" if store.direct else "through HDF5",
        }
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "grid": store.grid.describe(),
        "samples": {"count": store.num_samples, **_describe_coords(store.coords)},
        "channels": dict(zip(store.channels, store.units, strict=True)),
        "constants": list(store.constants),
        "storage": storage,
        "attributes": {name: _plain(value) for name, value in store.attributes.items()},
    }


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
        steps = np.diff(values).astype(np.int64)
        if len(steps):
            usual = int(np.median(steps))
            after = values[1:][steps > usual]
            described[name].update({"step_hours": usual / 3600, "gaps": len(after)})
            described[name]["first_gaps_end"] = [str(time) for time in after[:5]]
    return described


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
