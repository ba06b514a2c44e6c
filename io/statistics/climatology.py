"""What the weather usually is at each place: the mean of all times, and the mean of each week of the year.

Both are forecasts that any model must beat (Rasp et al. 2020, WeatherBench: "climatology" and "weekly climatology"), and
the weekly one is what anomalies are counted from. They are taken from the training split alone, in physical units, summed
in float64 week by week in the order of time; ranks take whole weeks, so the result is the same for any number of them. It
is kept as a file beside the data, like statistics.

Dimensions: n samples read, C channels, H latitude rows, W longitude columns, 52 weeks.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import NotPlainError, open_regular
from smoe_hpc.files.writing import write_result
from smoe_hpc.io.communicator import SINGLE_PROCESS, Communicator, share
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.cache import cache_file, keep, refuse_large
from smoe_hpc.io.store import transforms
from smoe_hpc.io.store.interface import FieldReader

WEEKS = 52
_SLAB_BYTES = 32 << 20
# What numpy and zipfile make of a broken file.
_UNREADABLE = (OSError, ValueError, LookupError, EOFError, MemoryError, RuntimeError, SyntaxError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class Climatology:
    """Means of physical values over the fields of a split.

    Args:
        channels: names, in order.
        mean: [C, H, W] float64, over all times.
        weekly: [52, C, H, W] float64, over the times of each week; a week of which no time is stored has ``mean``.
    """

    channels: tuple[str, ...]
    mean: np.ndarray
    weekly: np.ndarray

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. DataError if it cannot be written."""
        with tempfile.TemporaryFile() as file:
            np.savez(file, channels=np.array(self.channels), mean=self.mean, weekly=self.weekly)
            file.seek(0)
            write_result(path, file.read())

    @classmethod
    def load(cls, path: Path) -> Climatology:
        """Read the file. DataError if it is missing or holds something else."""
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                _require_as_stored(file)
                with np.load(file, allow_pickle=False) as content:
                    channels, mean, weekly = (content[name] for name in ("channels", "mean", "weekly"))
            if channels.dtype.kind != "U" or channels.ndim != 1 or not mean.dtype == weekly.dtype == np.float64:
                raise NotPlainError("it holds other types")
            if mean.ndim != 3 or len(mean) != len(channels) or weekly.shape != (WEEKS, *mean.shape):
                raise NotPlainError(f"its shapes {channels.shape}, {mean.shape} and {weekly.shape} do not fit together")
            if not (np.isfinite(mean).all() and np.isfinite(weekly).all()):
                raise NotPlainError("it holds values that are not finite")
            return cls(tuple(channels.tolist()), mean, weekly)
        except _UNREADABLE as error:
            raise DataError(f"cannot read climatology {path} ({error}); compute it again") from error


def _require_as_stored(file: IO[bytes]) -> None:
    """Raise unless the arrays of a file lie in it as they are, so that none is larger than the file."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(m.file_size for m in members) > size:
        raise NotPlainError("its arrays are compressed")


def week_of(times: np.ndarray) -> np.ndarray:
    """Week of the year, 0 to 51, of each time; the 365th day and the 366th belong to the last.

    >>> week_of(np.array(["2016-01-07", "2016-01-08", "2016-12-31"], dtype="datetime64[s]")).tolist()
    [0, 1, 51]
    """
    days = times.astype("datetime64[D]")
    of_year = (days - days.astype("datetime64[Y]")).astype(np.int64)
    return np.minimum(of_year // 7, WEEKS - 1)


def climatology_of(
    store: FieldReader,
    split: Split,
    channels: Sequence[str],
    communicator: Communicator = SINGLE_PROCESS,
    compute: str = "small",
) -> Climatology:
    """The climatology from the cache beside the data, computed and put there where it is missing. Collective over the
    communicator.

    Args:
        store: the data, of times.
        split: the fields to go over: those of training.
        channels: which channels.
        communicator: who shares the work.
        compute: "small" refuses to go over more than 4 GiB here and now; "always" goes over anything.

    Raises:
        DataError: what :func:`compute_climatology` raises; with "small", large data whose climatology is not cached.
    """
    names = tuple(channels)
    path = cache_file(store, "climatology", [split.text, names], ".npz")
    try:
        cached = Climatology.load(path)
    except DataError:  # not there, or damaged: it is computed anew
        cached = None
    if cached is not None and (cached.channels, cached.mean.shape[1:]) != (names, store.grid.shape):
        cached = None
    if all(communicator.gather(cached is not None)):
        assert cached is not None
        return cached
    if compute == "small":
        refuse_large(store, split, len(names), "climatological means")
    found = compute_climatology(store, split, names, communicator)
    if communicator.rank == 0:
        try:
            keep(path, found.save, store.folder)
        except DataError as error:  # it is there all the same, and the next run computes it again
            warnings.warn(f"{error}; the climatology is used but not kept", stacklevel=2)
    return found


def compute_climatology(
    store: FieldReader, split: Split, channels: Sequence[str], communicator: Communicator = SINGLE_PROCESS
) -> Climatology:
    """Means over every stored field of a split. Collective over the communicator, which shares the weeks of the year.

    Raises:
        DataError: a store without times, an empty split, an unknown channel, a file that cannot be read, on whichever rank.
    """
    if "time" not in store.coords:
        raise DataError(f"{store.path} has no times but {', '.join(store.coords)}; a climatology is of times")
    names = tuple(channels)
    rows = np.flatnonzero(split.mask(store.coords))
    if not len(rows):
        raise DataError(f"split {split.text!r} holds no field of {store.path}; nothing to take a climatology of")
    week = week_of(store.coords["time"][rows])
    work: list[np.ndarray | None] | DataError
    try:
        work = [_sum(store, rows[week == number], names) for number in share(WEEKS, communicator)]
    except DataError as error:  # raised together below: the others wait in the gather
        work = error
    sums: list[np.ndarray | None] = []
    for part in communicator.gather(work):
        if isinstance(part, DataError):
            raise part
        sums += part
    counts = np.bincount(week, minlength=WEEKS)
    mean = sum(total for total in sums if total is not None) / len(rows)
    of_weeks = [mean if total is None else total / count for total, count in zip(sums, counts, strict=True)]
    return Climatology(names, mean, np.stack(of_weeks))


def _sum(store: FieldReader, rows: np.ndarray, names: tuple[str, ...]) -> np.ndarray | None:
    """[C, H, W] float64 sum of physical values over some rows; None of none."""
    if not len(rows):
        return None
    total = np.zeros((len(names), *store.grid.shape))
    kinds = [store.transforms[index] for index in store.channel_indices(names)]
    slab = max(1, _SLAB_BYTES // (8 * total.size))
    for first in range(0, len(rows), slab):
        values = store.read(rows[first : first + slab], names).astype(np.float64)
        for channel, kind in enumerate(kinds):
            if kind != transforms.NONE:
                values[:, channel] = transforms.undo(kind, values[:, channel])
        total += values.sum(axis=0)
    return total
