"""Where a field is not finite, found and said in one way.

Dimensions: C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smoe_hpc.io.grids import Grid


@dataclass(frozen=True)
class NotFinitePlace:
    """Values of one channel of a sample that are NaN or infinite: how many, and where the first stands (degrees).

    >>> print(NotFinitePlace("tp", 52.0, 15.0, 2))
    channel 'tp': 2 values are not finite, the first at lat 52, lon 15
    """

    channel: str
    lat: float
    lon: float
    count: int

    def __str__(self) -> str:
        many = f"{self.count} values are not finite, the first" if self.count > 1 else "1 value is not finite,"
        return f"channel {self.channel!r}: {many} at lat {self.lat:g}, lon {self.lon:g}"


def find_not_finite(fields: np.ndarray, channels: Sequence[str], grid: Grid) -> list[NotFinitePlace]:
    """Channels of a sample that hold a value that is not finite, in order.

    Args:
        fields: [C, H, W].
        channels: C names.
        grid: the points.
    """
    if fields.dtype.kind != "f":
        return []
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(fields.sum(dtype=np.float32)):  # one sum is not finite as soon as one value is not
            return []
    found = []
    for channel, finite in zip(channels, np.isfinite(fields), strict=True):
        if not finite.all():
            i, j = (int(index) for index in np.argwhere(~finite)[0])
            found.append(NotFinitePlace(channel, float(grid.lat[i]), float(grid.lon[j]), int((~finite).sum())))
    return found
