"""Which stored fields make a sample, and which samples make a batch.

A sample is a few input fields before and at its start, and one target field after it. All of them must be stored, in
one run and in one split; a window that would cross a gap, the end of a run or the edge of a split is not a sample. The
order of samples is a pure function of (seed, epoch), and each rank takes its part of every global batch: nothing here
depends on what happened before, so a run can be resumed at any step with any number of ranks. No file is opened here.

Dimensions: T stored fields, S samples, I input fields, B global batch, R ranks, A accumulated micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np

from smoe_hpc.errors import DataError

SECONDS_PER_HOUR = 3600
DAY = np.timedelta64(1, "D")


@dataclass(frozen=True)
class Window:
    """Fields of a sample relative to its start, in hours where samples are times and in steps where they are runs.

    Args:
        inputs: where the input fields lie, ascending, none after 0, e.g. ``(-12, -6, 0)`` or ``(0,)``.
        lead: from the start to the target, positive, e.g. ``72`` or ``1``.
    """

    inputs: tuple[int, ...]
    lead: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(int(i) for i in self.inputs))
        if not self.inputs or list(self.inputs) != sorted(set(self.inputs)) or self.inputs[-1] > 0:
            raise DataError(f"window.inputs={self.inputs}: they must ascend and end at or before 0; try (-12, -6, 0)")
        if self.lead <= 0:
            raise DataError(f"window.lead={self.lead}: the target lies after the start; give a positive lead, e.g. 72")


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
        """[T] bool: which stored fields belong to the split.

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
        mask = np.zeros(len(values), dtype=bool)
        for first, end in parts:
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
            mask |= inside
        return mask


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
        Input rows [S, I] and target rows [S], int64, samples in the order of the store.

    Raises:
        DataError: coordinates out of order, or not one whole window among them.

    >>> time = np.datetime64("2016-02-28T00") + 6 * np.arange(8) * np.timedelta64(1, "h")
    >>> sample_rows({"time": time}, Window(inputs=(-6, 0), lead=12))[1]
    array([3, 4, 5, 6, 7])
    >>> runs = {"run": np.array([0, 0, 0, 1, 1]), "step": np.array([0, 1, 2, 0, 1])}
    >>> sample_rows(runs, Window(inputs=(0,), lead=1))[1]  # row 3 starts another run: never a target
    array([1, 2, 4])
    """
    offsets = np.array([*window.inputs, window.lead], dtype=np.int64)
    if "time" in coords:
        place = coords["time"].astype("datetime64[s]").astype(np.int64)
        offsets = offsets * SECONDS_PER_HOUR
    elif "run" in coords and "step" in coords:
        step = np.asarray(coords["step"], dtype=np.int64)
        reach = int(np.ptp(step)) + int(np.abs(offsets).max()) + 1 if len(step) else 1
        place = np.asarray(coords["run"], dtype=np.int64) * 2 * reach + step  # too far apart for a window to join runs
    else:
        raise DataError(f"samples are named by {', '.join(coords)}; windows need time, or run and step")
    if not (np.diff(place) > 0).all():
        raise DataError("samples must strictly ascend in time, or by run and step; write the store in that order")
    wanted = place[:, None] + offsets  # [T, I + 1]: one candidate per stored start
    rows = np.minimum(np.searchsorted(place, wanted), len(place) - 1)
    whole = (place[rows] == wanted).all(axis=1) if len(place) else np.zeros(0, dtype=bool)
    if split is not None:
        whole &= split.mask(coords)[rows].all(axis=1)
    if not whole.any():
        where = f"split {split.text!r} of {_extent(coords)}" if split else _extent(coords)
        raise DataError(f"no sample: {where} never holds {window}; check the split and the store's time step")
    return rows[whole, :-1], rows[whole, -1]


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


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """[S] int64: every sample once, shuffled by (seed, epoch) and nothing else.

    Sorting a counter-based generator's raw numbers, unlike a library's shuffle, gives the same order in every version.

    >>> epoch_order(5, seed=0, epoch=0).tolist(), epoch_order(5, seed=0, epoch=1).tolist()
    ([0, 3, 1, 2, 4], [3, 4, 2, 1, 0])
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(raw, kind="stable").astype(np.int64)


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole batches in an epoch; what is left over waits for another epoch's order.

    Raises:
        DataError: not even one whole batch.
    """
    if num_samples < global_batch:
        raise DataError(f"{num_samples} samples do not fill one batch of {global_batch}; lower training.batch")
    return num_samples // global_batch


def batch_positions(
    num_samples: int, global_batch: int, accumulation: int, rank: int, world: int, step_in_epoch: int
) -> np.ndarray:
    """Positions in the epoch's order that one rank takes in one step.

    Returns:
        [A, B / (R A)] int64, one row a micro-batch. Those of all ranks, flattened and concatenated by rank, are the
        batch of a single process: ``step_in_epoch * B`` and on.

    Raises:
        DataError: a batch that ranks and micro-batches do not divide, or a step beyond the epoch.

    >>> batch_positions(100, 8, 2, rank=1, world=2, step_in_epoch=3).tolist()
    [[28, 29], [30, 31]]
    """
    if global_batch < 1 or accumulation < 1 or not 0 <= rank < world:
        raise DataError(f"batch {global_batch}, accumulation {accumulation}, rank {rank} of {world} is not possible")
    if global_batch % (world * accumulation):
        raise DataError(
            f"training.batch={global_batch} is global and must be divisible by {world} ranks x {accumulation} "
            f"accumulation; try {-(-global_batch // (world * accumulation)) * world * accumulation}"
        )
    steps = steps_per_epoch(num_samples, global_batch)
    if not 0 <= step_in_epoch < steps:
        raise DataError(f"step {step_in_epoch} is outside the epoch's {steps} steps")
    share = global_batch // world
    first = step_in_epoch * global_batch + rank * share
    return np.arange(first, first + share, dtype=np.int64).reshape(accumulation, -1)


def evaluation_batches(num_samples: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Samples that one rank evaluates, in order: over all ranks every sample exactly once.

    Args:
        num_samples: S.
        batch: samples of one batch on one rank.
        rank: this rank.
        world: R.

    Returns:
        [steps, batch] int64, the same shape on every rank; the last ones are filled with -1, to be masked.

    >>> [evaluation_batches(5, 2, rank, 2).tolist() for rank in (0, 1)]
    [[[0, 1], [4, -1]], [[2, 3], [-1, -1]]]
    """
    if batch < 1 or not 0 <= rank < world or num_samples < 1:
        raise DataError(f"cannot evaluate {num_samples} samples in batches of {batch} on rank {rank} of {world}")
    steps = -(-num_samples // (batch * world))
    samples = np.arange(steps * batch * world, dtype=np.int64)
    samples[num_samples:] = -1
    return samples.reshape(steps, world, batch)[:, rank]
