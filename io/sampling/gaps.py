"""Where times of a store are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.sampling.coordinates import axis_of
from smoe_hpc.io.sampling.splits import Split


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


def refuse_gaps(coords: Mapping[str, np.ndarray], split: Split | None, describe: Callable[[int], str]) -> None:
    """See that no field is missing between two fields of one part of a split, or of one run.

    Args:
        coords: as `sample_rows` takes them.
        split: the part of the store that must be whole; all of it when None.
        describe: names a row to a person, with its file.

    Raises:
        DataError: a hole; it names the fields around the first and how much is missing.
    """
    axis, unit = axis_of(coords, 0)
    part = np.zeros(len(axis), dtype=np.int64) if split is None else split.parts_of(coords)
    if "time" not in coords:
        part = np.where(part < 0, part, coords["run"])
    apart = np.diff(axis)
    within = (part[1:] == part[:-1]) & (part[1:] >= 0)
    if not within.any():
        return
    usual = int(apart[within].min())
    holes = np.flatnonzero(within & (apart > usual))
    if len(holes):
        row, missing = int(holes[0]), int((apart[holes] // usual - 1).sum())
        what, step = ("times", f"{usual / unit:g} h") if "time" in coords else ("steps", str(usual))
        raise DataError(
            f"{missing} {what} are missing, the first between {describe(row)} and {describe(row + 1)}, where fields lie "
            f"{step} apart; add them to the data, or set data.gaps=skip to leave out the samples that need them"
        )
