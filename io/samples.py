"""Which stored fields make a sample.

A sample is a few input fields before and at its start, and one or several target fields after it. All of them must be
stored, in one run and in one split; a window that would cross a gap, the end of a run or the edge of a split is not a
sample. The order of samples and their shares by rank stand in :mod:`smoe_hpc.io.order`. No file is opened here.

Dimensions: T stored fields, S starts of samples, I input fields, L leads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.gaps import usual_step

SECONDS_PER_HOUR = 3600
DAY = np.timedelta64(1, "D")


@dataclass(frozen=True)
class Window:
    """Fields of a sample relative to its start, in hours where samples are times and in steps where they are runs.

    Args:
        inputs: where the input fields lie, ascending, none after 0, e.g. ``(-12, -6, 0)`` or ``(0,)``.
        leads: from the start to the targets, positive and ascending, e.g. ``(24, 72)``; a single number is one lead.
        mode: what several leads make: "stacked" puts the targets of all of them into one sample, side by side as
            channels; "drawn" gives a start one lead in each epoch, another in the next; "each" makes a sample of every
            start with every lead (how a model trained on drawn leads is evaluated). Starts are always those for which
            every lead is stored.
    """

    inputs: tuple[int, ...]
    leads: tuple[int, ...]
    mode: Literal["stacked", "drawn", "each"] = "stacked"

    def __post_init__(self) -> None:
        leads = (self.leads,) if isinstance(self.leads, int | np.integer) else self.leads
        object.__setattr__(self, "inputs", tuple(int(i) for i in self.inputs))
        object.__setattr__(self, "leads", tuple(int(lead) for lead in leads))
        if not self.inputs or list(self.inputs) != sorted(set(self.inputs)) or self.inputs[-1] > 0:
            raise DataError(f"window.inputs={self.inputs}: they must ascend and end at or before 0; try (-12, -6, 0)")
        if not self.leads or self.leads[0] <= 0 or list(self.leads) != sorted(set(self.leads)):
            raise DataError(
                f"window.leads={self.leads}: targets lie after the start, in ascending order; give positive leads, e.g. 72"
            )
        if self.mode not in ("stacked", "drawn", "each"):
            raise DataError(f"window.mode={self.mode!r} is not known; choose stacked, drawn or each")

    @property
    def lead(self) -> int:
        """The only lead.

        Raises:
            DataError: there are several.
        """
        if len(self.leads) > 1:
            raise DataError(f"the window has {len(self.leads)} leads {self.leads}, not one")
        return self.leads[0]

    @property
    def by_lead(self) -> bool:
        """Whether each sample has one lead of its own."""
        return self.mode != "stacked"


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
                    f"split {self.text!r}: {first}/{end - DAY} holds no field; the store has {_extent(coords)}; give "
                    "days within"
                )
            if not by_date and not ((values == first).any() and (values == end - 1).any()):
                raise DataError(
                    f"split {self.text!r}: runs {first}:{end} are not all stored; the store has {_stored_runs(values)}; "
                    "give runs within"
                )
            part_of[inside & (part_of < 0)] = number
        return part_of


def sample_rows(
    coords: Mapping[str, np.ndarray], window: Window, split: Split | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the store that make each sample.

    Args:
        coords: ``time`` [T] datetime64, strictly ascending, gaps allowed; or ``run`` and ``step`` [T] integers,
            ascending by run and within a run by step.
        window: the fields a sample needs.
        split: where all of them must lie; everywhere when None.

    Returns:
        Input rows [S, I] and target rows [S, L], int64, samples in the order of the store.

    Raises:
        DataError: coordinates out of order, or not one whole window among them.

    >>> time = np.datetime64("2016-02-28T00") + 6 * np.arange(8) * np.timedelta64(1, "h")
    >>> sample_rows({"time": time}, Window(inputs=(-6, 0), leads=12))[1].ravel()
    array([3, 4, 5, 6, 7])
    >>> runs = {"run": np.array([0, 0, 0, 1, 1]), "step": np.array([0, 1, 2, 0, 1])}
    >>> sample_rows(runs, Window(inputs=(0,), leads=1))[1].ravel()  # row 3 starts another run: never a target
    array([1, 2, 4])
    """
    offsets = np.array([*window.inputs, *window.leads], dtype=np.int64)
    place, unit = _places(coords, int(np.abs(offsets).max()))
    if not (np.diff(place) > 0).all():
        raise DataError("samples must strictly ascend in time, or by run and step; write the store in that order")
    wanted = place[:, None] + offsets * unit  # [T, I + L]: one candidate per stored start
    rows = np.minimum(np.searchsorted(place, wanted), len(place) - 1)
    whole = (place[rows] == wanted).all(axis=1) if len(place) else np.zeros(0, dtype=bool)
    if split is not None:
        whole &= split.mask(coords)[rows].all(axis=1)
    if not whole.any():
        raise DataError(f"no sample: {_why_none(coords, window, split)}")
    count = len(window.inputs)
    return rows[whole, :count], rows[whole, count:]


def _why_none(coords: Mapping[str, np.ndarray], window: Window, split: Split | None) -> str:
    """What no window fits into, and what to do about it."""
    where = f"split {split.text!r} of {_extent(coords)}" if split else _extent(coords)
    unit = " h" if "time" in coords else " steps"
    step = usual_step(coords["time"].astype("datetime64[s]")) if "time" in coords else None
    if step is not None:
        off = [hours for hours in (*window.inputs, *window.leads) if hours * SECONDS_PER_HOUR % step]
        if off:
            hours = ", ".join(map(str, off))
            return (
                f"{where} has a field every {step / SECONDS_PER_HOUR:g} h, of which {hours} h (data.inputs, data.leads) are no "
                "multiples; give multiples"
            )
    needs = f"{-window.inputs[0]}{unit} before the start to {window.leads[-1]}{unit} after it"
    days = f" and of {_days(split)} days" if split is not None and "time" in coords else ""
    return f"{where}{days} never holds a whole window, from {needs}; give a longer split, or a shorter window"


def _days(split: Split) -> int:
    """Days of the split's longest part."""
    return max(int((end - first) // DAY) for first, end in split._parts())


def _places(coords: Mapping[str, np.ndarray], reach: int) -> tuple[np.ndarray, int]:
    """Where each field lies on one line [T] int64, runs too far apart for ``reach`` to join them; and the line's unit."""
    if "time" in coords:
        return coords["time"].astype("datetime64[s]").astype(np.int64), SECONDS_PER_HOUR
    if "run" not in coords or "step" not in coords:
        raise DataError(f"samples are named by {', '.join(coords)}; windows need time, or run and step")
    step = np.asarray(coords["step"], dtype=np.int64)
    apart = 2 * (int(np.ptp(step)) + reach + 1) if len(step) else 1
    return np.asarray(coords["run"], dtype=np.int64) * apart + step, 1


def refuse_gaps(coords: Mapping[str, np.ndarray], split: Split | None, describe: Callable[[int], str]) -> None:
    """See that no field is missing between two fields of one part of a split, or of one run.

    Args:
        coords: as `sample_rows` takes them.
        split: the part of the store that must be whole; all of it when None.
        describe: names a row to a person, with its file.

    Raises:
        DataError: a hole; it names the fields around the first and how much is missing.
    """
    place, unit = _places(coords, 0)
    part = np.zeros(len(place), dtype=np.int64) if split is None else split.parts_of(coords)
    if "time" not in coords:
        part = np.where(part < 0, part, coords["run"])
    apart = np.diff(place)
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


def _extent(coords: Mapping[str, np.ndarray]) -> str:
    name = "time" if "time" in coords else "run"
    values = coords[name]
    return f"{len(values)} fields" + (f" ({name} {values[0]} to {values[-1]})" if len(values) else "")


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
