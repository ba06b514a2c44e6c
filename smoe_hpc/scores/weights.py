"""How much a cell counts.

Two conventions are in use and differ by up to a few parts in a thousand, so both are offered: the cosine of the
latitude (Rasp and Thuerey 2021, WeatherBench 1: `Grid.cos_latitude_weights`) and, here, the area between the cell's
bounds (WeatherBench 2).

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid


def area_weights(grid: Grid) -> np.ndarray:
    """Sine of the upper minus sine of the lower bound of each row, over its mean; ones on a plane.

    Bounds lie half way between rows; the outermost rows reach as far outward as inward, but not beyond a pole. On a
    global grid these are WeatherBench 2's weights (whose outermost rows always reach the poles); a regional one keeps
    to its own area.

    Returns:
        [H, W] float64, mean 1.

    Raises:
        DataError: a single row of latitude, which has no bounds.
    """
    if grid.kind == "plane":
        return np.ones(grid.shape)
    lat = grid.lat
    if len(lat) < 2:
        raise DataError("area weights need at least two latitude rows to know their bounds; use cosine weights")
    between = (lat[:-1] + lat[1:]) / 2
    first, last = 2 * lat[0] - between[0], 2 * lat[-1] - between[-1]
    bounds = np.concatenate([[first], between, [last]]).clip(-90.0, 90.0)
    rows = np.diff(np.sin(np.deg2rad(bounds)))
    return np.repeat((rows / rows.mean())[:, None], grid.shape[1], axis=1)
