"""Mean and standard deviation of each channel: streaming, in float64, exact to rounding.

Moments (:mod:`smoe_hpc.io.statistics.moments`) are always merged in the same order: fields are cut by how many there are,
ranks take whole pieces, and everybody merges all pieces. So the result is the same to the bit for any number of ranks.
Statistics are of stored space (precipitation in the logarithm), which is what models take. They are kept as a small JSON
file, keyed by the data's digest, channels and split.

Dimensions: n samples of a slab, C channels, H latitude rows, W longitude columns, R ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import parse_json, read_bytes
from smoe_hpc.files.writing import write_result
from smoe_hpc.io.communicator import SINGLE_PROCESS, Communicator, share
from smoe_hpc.io.finite import find_not_finite
from smoe_hpc.io.names import known_names
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.cache import cache_file, keep, refuse_large
from smoe_hpc.io.statistics.moments import Moments
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.io.store.transforms import NONE
from smoe_hpc.progress import Progress

_SLAB_BYTES = 32 << 20
_MOST_BYTES = 16 << 20  # of a file of statistics: some 100 a channel
_PIECES = 256  # that the fields are cut into, at most; a rank takes whole pieces


@dataclass(frozen=True)
class Statistics:
    """What normalises channels: ``(x - mean) / std``.

    Args:
        channels: names, in order.
        mean: one number a channel, in its units.
        std: likewise, population standard deviation, positive.
        count: values (samples x points) behind each.
        split: the part of the data they were taken from.
        transforms: one text a channel, what stands between its units and the values here; empty for ``none`` of all.

    Raises:
        DataError: a channel that never changes (its std is 0), or lengths that differ.
    """

    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    split: str
    transforms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.transforms:
            object.__setattr__(self, "transforms", (NONE,) * len(self.channels))
        if not len(self.channels) == len(self.mean) == len(self.std) == len(self.transforms):
            raise DataError(f"statistics: {len(self.channels)} channels, {len(self.mean)} means, {len(self.std)} stds")
        for name, mean, std in zip(self.channels, self.mean, self.std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise DataError(f"channel {name!r} has mean {mean:g} and std {std:g}: it cannot be normalised; leave it out")

    def select(self, channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std [C, 1, 1] float32 of the named channels.

        Raises:
            DataError: statistics of another channel set.
        """
        indices = self.channel_indices(channels)
        mean, std = (np.array(values, dtype=np.float32)[indices, None, None] for values in (self.mean, self.std))
        return mean, std

    def channel_indices(self, channels: Sequence[str]) -> list[int]:
        """Indices of the named channels.

        Raises:
            DataError: a channel that these are not of.
        """
        for name in channels:
            if name not in self.channels:
                raise DataError(
                    f"the statistics are of other channels: they lack {name!r}; {known_names(name, self.channels)}. "
                    "Compute them from the store in use"
                )
        return [self.channels.index(name) for name in channels]

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all; safe when several processes do at the same time.

        Raises:
            DataError: it cannot be written.
        """
        rows = zip(self.channels, self.mean, self.std, self.transforms, strict=True)
        channels = {
            name: {"mean": mean, "std": std} | ({} if transform == NONE else {"transform": transform})
            for name, mean, std, transform in rows
        }
        content = {"channels": channels, "count": self.count, "split": self.split}
        write_result(Path(path), json.dumps({**content, "sha256": _hash(content)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read the JSON file.

        Raises:
            DataError: missing, not statistics, or changed since they were written; it names the file.
        """
        try:
            content = parse_json(read_bytes(Path(path), _MOST_BYTES))
            if content.pop("sha256") != _hash(content):
                raise DataError("they were changed since they were written")
            channels = content["channels"]
            mean, std = (tuple(float(entry[key]) for entry in channels.values()) for key in ("mean", "std"))
            transforms = tuple(str(entry.get("transform", NONE)) for entry in channels.values())
            return cls(tuple(channels), mean, std, int(content["count"]), str(content["split"]), transforms)
        except OSError as error:
            raise DataError(f"cannot read statistics {path}: {error.strerror}; compute them again") from error
        except DataError as error:
            raise DataError(f"statistics {path} cannot be used: {error}; remove the file, and compute them again") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"{path} does not hold statistics ({error}); compute them again") from error


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def statistics_of(
    store: FieldReader,
    split: Split,
    channels: Sequence[str] | None = None,
    communicator: Communicator = SINGLE_PROCESS,
    compute: str = "small",
    progress: Progress | None = None,
) -> Statistics:
    """Statistics from the cache beside the data, computed and put there where they are missing.

    Collective over the communicator, which shares the work; processes that know nothing of each other may also do it at
    the same time.

    Args:
        store: the data.
        split: the fields to go over.
        channels: which channels, all when None.
        communicator: who shares the work.
        compute: ``"small"`` refuses to go over more than 4 GiB here and now; ``"always"`` goes over anything.
        progress: called with (fields done, fields in all) of this rank.

    Raises:
        DataError: what :func:`compute_statistics` raises; with ``"small"``, large data without cached statistics.
    """
    names = tuple(store.channels if channels is None else channels)
    indices = store.channel_indices(names)
    path = cache_file(store, "statistics", [split.text, names], ".json")
    cached = _load_cached(path, names, split.text, tuple(store.transforms[index] for index in indices))
    if all(communicator.gather(cached is not None)):  # or else everybody computes, since that is collective
        assert cached is not None
        return cached
    if compute == "small":
        refuse_large(store, split, len(indices), "statistics")
    found = compute_statistics(store, split, names, communicator, progress)
    if communicator.rank == 0:
        try:
            keep(path, found.save, store.folder)
        except DataError as error:  # they are there all the same, and the next run computes them again
            warnings.warn(f"{error}; the statistics are used but not kept", stacklevel=2)
    return found


def _load_cached(path: Path, channels: tuple[str, ...], split: str, transforms: tuple[str, ...]) -> Statistics | None:
    """None too where the file was damaged or is of something else: it is computed anew and written over."""
    try:
        found = Statistics.load(path)
    except DataError:
        return None
    return found if (found.channels, found.split, found.transforms) == (channels, split, transforms) else None


def compute_statistics(
    store: FieldReader,
    split: Split,
    channels: Sequence[str] | None = None,
    communicator: Communicator = SINGLE_PROCESS,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics over every stored field of a split (the training split: nothing else may be known to a model).

    Collective over the communicator, which shares the fields; the result is the same on every rank and for any communicator.

    Args:
        store: the data.
        split: the fields to go over.
        channels: which channels, all when None.
        communicator: who shares the work.
        progress: called with (fields done, fields in all) of this rank.

    Raises:
        DataError: an empty split, an unknown channel, a channel that never changes, a field that is not finite (named),
            a file that cannot be read, on whichever rank.
    """
    names = tuple(store.channels if channels is None else channels)
    transforms = tuple(store.transforms[index] for index in store.channel_indices(names))
    rows = np.flatnonzero(split.mask(store.coords))
    if not len(rows):
        raise DataError(f"split {split.text!r} holds no field of {store.path}; nothing to take statistics of")
    pieces = np.array_split(rows, min(_PIECES, len(rows)))
    mine = share(len(pieces), communicator)
    work: list[Moments] | DataError
    try:
        work = _moments(store, [pieces[number] for number in mine], names, progress)
    except DataError as error:  # raised together below: the others wait in the gather
        work = error
    total: Moments | None = None
    for part in communicator.gather(work):
        if isinstance(part, DataError):
            raise part
        for moments in part:
            total = moments if total is None else total.merge(moments)
    assert total is not None
    std = np.sqrt(total.squares / total.count)
    try:
        return Statistics(names, tuple(total.mean.tolist()), tuple(std.tolist()), total.count, split.text, transforms)
    except DataError as error:
        raise DataError(f"{store.path} (split {split.text!r}): {error}") from error


def _moments(store: FieldReader, pieces: list[np.ndarray], names: tuple[str, ...], progress: Progress | None) -> list[Moments]:
    """Moments of each piece (row numbers), gone over in slabs that fit the memory."""
    height, width = store.grid.shape
    slab = max(1, _SLAB_BYTES // (4 * len(names) * height * width))
    fields = np.empty((slab, len(names), height, width), dtype=np.float32)
    found, done, total = [], 0, sum(len(rows) for rows in pieces)
    for rows in pieces:
        moments: Moments | None = None
        for first in range(0, len(rows), slab):
            some = rows[first : first + slab]
            of_slab = Moments.of(store.read(some, names, out=fields[: len(some)]))
            if not np.isfinite(of_slab.squares).all():
                raise _not_finite(store, some, names)
            moments = of_slab if moments is None else moments.merge(of_slab)
            done += len(some)
            if progress is not None:
                progress(done, total)
        assert moments is not None
        found.append(moments)
    return found


def _not_finite(store: FieldReader, rows: np.ndarray, names: tuple[str, ...]) -> DataError:
    for row in rows.tolist():
        found = find_not_finite(store.read([row], names)[0], names, store.grid)
        if found:
            return DataError(
                f"{store.describe_row(row)}, {found[0]}; write the file again "
                f"(`smoe-hpc data verify {store.path}` lists all such values)"
            )
    return DataError(f"{store.path}: values are too large for statistics; check their units")
