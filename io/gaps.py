"""Where times of a store are missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gap:
    """Times that are not there: the stored ones before and after them, and how many samples there should be between."""

    before: str
    after: str
    missing: int


def usual_step(time: np.ndarray) -> int | None:
    """Seconds from one sample to the next, as most of them lie; None for fewer than two.

    >>> usual_step(np.array(["2016-01-01T00", "2016-01-01T06", "2016-01-01T12"], "datetime64[s]"))
    21600
    """
    steps = np.diff(time).astype(np.int64)
    steps = steps[steps > 0]  # members share a time
    return int(np.median(steps)) if len(steps) else None


def find_gaps(time: np.ndarray) -> list[Gap]:
    """Where consecutive times lie further apart than usual.

    >>> find_gaps(np.array(["2016-01-01T00", "2016-01-01T06", "2016-01-01T12", "2016-01-02T00"], "datetime64[s]"))
    [Gap(before='2016-01-01T12:00:00', after='2016-01-02T00:00:00', missing=1)]
    """
    usual = usual_step(time)
    if usual is None:
        return []
    steps = np.diff(time).astype(np.int64)
    return [
        Gap(str(time[row]), str(time[row + 1]), round(float(steps[row] / usual)) - 1)
        for row in np.flatnonzero(steps > usual).tolist()
    ]
