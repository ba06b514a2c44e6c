"""Which stored fields make a sample.

A sample is a few input fields before and at its start, and one or several target fields after it. All of them must be
stored, in one run and in one split; a window that would cross a gap, the end of a run or the edge of a split is not a
sample. The order of samples and their shares by rank stand in :mod:`smoe_hpc.io.sampling.order`. No file is opened here.

Dimensions: T stored fields, S starts of samples, I input fields, L leads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.sampling.coordinates import SECONDS_PER_HOUR, axis_of, extent
from smoe_hpc.io.sampling.gaps import usual_step
from smoe_hpc.io.sampling.splits import Split


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


def sample_rows(coords: Mapping[str, np.ndarray], window: Window, split: Split | None = None) -> tuple[np.ndarray, np.ndarray]:
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
    axis, unit = axis_of(coords, int(np.abs(offsets).max()))
    if not (np.diff(axis) > 0).all():
        raise DataError("samples must strictly ascend in time, or by run and step; write the store in that order")
    wanted = axis[:, None] + offsets * unit  # [T, I + L]: one candidate per stored start
    rows = np.minimum(np.searchsorted(axis, wanted), len(axis) - 1)
    whole = (axis[rows] == wanted).all(axis=1) if len(axis) else np.zeros(0, dtype=bool)
    if split is not None:
        whole &= split.mask(coords)[rows].all(axis=1)
    if not whole.any():
        raise DataError(f"no sample: {_why_none(coords, window, split)}")
    count = len(window.inputs)
    return rows[whole, :count], rows[whole, count:]



def _why_none(coords: Mapping[str, np.ndarray], window: Window, split: Split | None) -> str:
    """What no window fits into, and what to do about it."""
    where = f"split {split.text!r} of {extent(coords)}" if split else extent(coords)
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
    days = f" and of {split.longest_days} days" if split is not None and "time" in coords else ""
    return f"{where}{days} never holds a whole window, from {needs}; give a longer split, or a shorter window"
