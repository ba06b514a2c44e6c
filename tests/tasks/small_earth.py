"""A month of made-up weather on 6 x 8 points, in two files, and a recipe that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.config import Data, Model, Recipe, Splits, Training
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store.writer import StoreWriter

GRID = Grid("latlon", np.array([-75.0, -45.0, -15.0, 15.0, 45.0, 75.0]), np.arange(8) * 45.0)
CHANNELS = ["z500", "t850", "t2m", "tp"]
UNITS = ["m2 s-2", "K", "K", "m"]
STEP = 6
TIMES = np.datetime64("2015-12-20T00") + np.arange(4 * 30) * np.timedelta64(STEP, "h")  # to 2016-01-18
SPLITS = Splits(train="2015-12-20/2016-01-04", validation="2016-01-05/2016-01-10", test="2016-01-11/2016-01-18")
TARGETS = ["z500", "tp"]


def values() -> np.ndarray:
    """[T, C, H, W] float32 in physical units."""
    rng = np.random.default_rng(0)
    shape = (len(TIMES), *GRID.shape)
    pattern = rng.standard_normal((4, *GRID.shape))
    fields = np.stack(
        [
            5e4 + 2e3 * (pattern[0] + 0.3 * rng.standard_normal(shape)),
            270 + 10 * (pattern[1] + 0.3 * rng.standard_normal(shape)),
            280 + 10 * (pattern[2] + 0.3 * rng.standard_normal(shape)),
            np.maximum(0.0, 2e-3 * (pattern[3] + rng.standard_normal(shape))),
        ],
        axis=1,
    )
    fields[:, 0] += 500 * np.sin(np.arange(len(TIMES)) / 20)[:, None, None]  # seasons of a kind
    return fields.astype(np.float32)


def write(path: Path, times: np.ndarray = TIMES, grid: Grid = GRID, rows: slice = slice(None)) -> Path:
    lat = np.repeat(grid.lat[:, None], grid.shape[1], axis=1)
    constants = {"latitude": lat, "orography": np.arange(lat.size, dtype=np.float64).reshape(lat.shape)}
    coords, transforms = {"time": times}, ["none", "none", "none", "log:0.001"]
    with StoreWriter(path, grid, CHANNELS, UNITS, coords=coords, constants=constants, transforms=transforms) as writer:
        writer.write(0, values()[rows])
    return path


def write_years(folder: Path) -> Path:
    """Two files, one a year."""
    new_year = int(np.flatnonzero(np.datetime64("2016-01-01T00") == TIMES)[0])
    write(folder / "era5_2015.h5", TIMES[:new_year], rows=slice(None, new_year))
    write(folder / "era5_2016.h5", TIMES[new_year:], rows=slice(new_year, None))
    return folder


def recipe(path: Path, model: Model | None = None, **data: Any) -> Recipe:
    given = {"inputs": [-12, -6, 0], "leads": [24], "targets": TARGETS, "constants": ["latitude", "orography"], **data}
    data = Data(store=str(path), splits=SPLITS, normalize=True, gaps="refuse", **given)
    model = model or Model(network="resnet", kind="conv", width=4, blocks=1, ghost_batch=2, padding="periodic_longitude")
    return Recipe(name="w", task="weather", data=data, model=model, training=Training(batch=4, threads=1))
