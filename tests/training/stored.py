"""The toy task on a store of times."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smoe_hpc.io import Grid, Store, StoreWriter
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.windows import Split, Window

from . import toy

DAYS = {"train": "2019-03-01/2019-03-03", "validation": "2019-03-04/2019-03-04", "test": "2019-03-05/2019-03-05"}


def write_store(path: Path) -> Path:
    """Five days of hourly fields."""
    times = np.datetime64("2019-03-01T00") + np.arange(120) * np.timedelta64(1, "h")
    fields = np.random.default_rng(0).normal(size=(120, 1, *toy.GRID)).astype(np.float32)
    with StoreWriter(path, Grid.plane(*toy.GRID), ["heat"], ["K"], coords={"time": times}) as writer:
        writer.write(0, fields)
    return path


class StoredTask(toy.ToyTask):
    def __init__(self, path: Path) -> None:
        super().__init__()
        store = Store(path)
        self._samples = {split: Samples(store, Window((0,), 1), Split(days)) for split, days in DAYS.items()}  # type: ignore[misc]
