"""Parts of the data, by days or by runs.

Dimensions: T stored fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.sampling.coordinates import extent

DAY = np.timedelta64(1, "D")


@dataclass(frozen=True)
class Split:
    """A part of the data, by run numbers or by dates.

    Args:
        text: ``"0:1000"`` (runs, the end not included) or ``"2019-03-01/2019-03-23"`` (days, both included; a time of
            the last day belongs to it); several parts are separated by commas.

    >>> Split("0:2,4:5").mask({"run": np.arange(6), "step": np.zeros(6)}).tolist()
    [True, True, False, False, True, False]
    """

    text: str

    def __post_init__(self) -> None:
        self._parts()

    def _parts(self) -> list[tuple[np.datetime64, np.datetime64] | tuple[int, int]]:
        """(first, end) of each part, the end not included."""
        parts: list[tuple[np.datetime64, np.datetime64] | tuple[int, int]] = []
        for part in self.text.split(","):
            try:
                if "/" in part:
                    first, last = (np.datetime64(date.fromisoformat(day.strip())) for day in part.split("/"))
                    found: tuple[np.datetime64, np.datetime64] | tuple[int, int] = (first, last + DAY)
                else:
                    start, end = (int(number) for number in part.split(":"))
                    found = (start, end)
            except ValueError as error:
                raise DataError(
                    f"split {self.text!r} is not understood; write runs as 0:1000 or days as 2019-03-01/2019-03-23"
                ) from error
            if not found[0] < found[1]:
                raise DataError(f"split {self.text!r} ends before it starts; write the smaller number or date first")
            parts.append(found)
        if len({type(first) for first, _ in parts}) > 1:
            raise DataError(f"split {self.text!r} mixes runs and dates; use one of them")
        return parts

    @property
    def longest_days(self) -> int:
        """Days of the longest part, where the parts are dates."""
        return max(int((end - first) // DAY) for first, end in self._parts())

    def mask(self, coords: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: which stored fields belong to the split; raises as `parts_of` does."""
        return self.parts_of(coords) >= 0

    def parts_of(self, coords: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] int64: which part of the split each stored field belongs to, the first that holds it; -1 for none.

        Raises:
            DataError: dates asked of a store of runs, or the reverse; a part whose first or last run is not stored, or
                days of which no time is.
        """
        parts = self._parts()
        by_date = isinstance(parts[0][0], np.datetime64)
        name = "time" if by_date else "run"
        if name not in coords:
            other = "run numbers such as 0:1000" if by_date else "dates such as 2019-03-01/2019-03-23"
            raise DataError(f"split {self.text!r} goes by {name} but the store has {', '.join(coords)}; give {other}")
        values = coords[name]
        part_of = np.full(len(values), -1, dtype=np.int64)
        for number, (first, end) in enumerate(parts):
            inside = (values >= first) & (values < end)
            if by_date and not inside.any():
                raise DataError(
                    f"split {self.text!r}: {first}/{end - DAY} holds no field; the store has {extent(coords)}; give days within"
                )
            if not by_date and not ((values == first).any() and (values == end - 1).any()):
                raise DataError(
                    f"split {self.text!r}: runs {first}:{end} are not all stored; the store has {_stored_runs(values)}; "
                    "give runs within"
                )
            part_of[inside & (part_of < 0)] = number
        return part_of


def _stored_runs(values: np.ndarray) -> str:
    """Runs as a split names them.

    >>> _stored_runs(np.array([0, 0, 1, 1, 7]))
    '0:2,7:8'
    """
    runs = np.unique(values).astype(np.int64)
    if not len(runs):
        return "no run"
    ranges = np.split(runs, np.flatnonzero(np.diff(runs) > 1) + 1)
    texts = [f"{run[0]}:{run[-1] + 1}" for run in ranges]
    return ",".join(texts if len(texts) <= 6 else [*texts[:3], "...", *texts[-2:]])
