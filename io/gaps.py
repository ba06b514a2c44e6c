"""Where times of a store are missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gap:
    """Where times do not follow each other step by step.

    Attributes:
        before: the stored time before it.
        after: the stored time that follows.
        missing: how many samples there should be between; 0 where the times are not on the step.
        step_hours: from one sample to the next, usually.
    """

    before: str
    after: str
    missing: int
    step_hours: float

    def __str__(self) -> str:
        if not self.missing:
            return f"times are not on the step of {self.step_hours:g} h: {self.before} is followed by {self.after}"
        samples = "1 sample is" if self.missing == 1 else f"{self.missing} samples are"
        return f"gap: {samples} missing after {self.before}; the next is {self.after}"


def usual_step(time: np.ndarray) -> int | None:
    """Seconds from one sample to the next, as most of them lie; None for fewer than two.

    >>> usual_step(np.array(["2016-01-01T00", "2016-01-01T06", "2016-01-01T12"], "datetime64[s]"))
    21600
    """
    steps = np.diff(time).astype(np.int64)
    steps = steps[steps > 0]  # members share a time
    return int(np.median(steps)) if len(steps) else None


def find_gaps(time: np.ndarray) -> list[Gap]:
    """Where consecutive times lie further apart than usual, or not whole steps apart (members share a time).

    >>> find_gaps(np.array(["2016-01-01T00", "2016-01-01T06", "2016-01-01T12", "2016-01-02T00"], "datetime64[s]"))
    [Gap(before='2016-01-01T12:00:00', after='2016-01-02T00:00:00', missing=1, step_hours=6.0)]
    """
    usual = usual_step(time)
    if usual is None:
        return []
    steps = np.diff(time).astype(np.int64)
    return [
        Gap(str(time[row]), str(time[row + 1]), int(steps[row] // usual) - 1 if steps[row] % usual == 0 else 0, usual / 3600)
        for row in np.flatnonzero((steps > usual) | ((steps > 0) & (steps % usual != 0))).tolist()
    ]
