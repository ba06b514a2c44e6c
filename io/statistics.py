"""Mean and standard deviation of each channel: streaming, in float64, exact to rounding.

Moments of slabs are merged by the rule of Chan, Golub and LeVeque (1979), so the result does not depend on how the
fields are cut, nor on which rank saw which. They are kept as a small JSON file, keyed by channels and split.

Dimensions: n samples of a slab, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io import layout
from smoe_hpc.io.samples import Split
from smoe_hpc.io.store import Store

_SLAB_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Moments:
    """Count of values, mean [C] and sum of squared distances from it [C], float64."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, fields: np.ndarray) -> Moments:
        """Moments of one slab [n, C, H, W], in two passes."""
        values = np.asarray(fields, dtype=np.float64)
        mean = values.mean(axis=(0, 2, 3))
        values = values - mean[:, None, None]
        return cls(values.size // values.shape[1], mean, np.square(values, out=values).sum(axis=(0, 2, 3)))

    def merge(self, other: Moments) -> Moments:
        """Moments of both together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart**2 * (self.count / count * other.count)
        return Moments(count, mean, squares)


@dataclass(frozen=True)
class Statistics:
    """What normalises channels: ``(x - mean) / std``.

    Args:
        channels: names, in order.
        mean: one number a channel, in its units.
        std: likewise, population standard deviation, positive.
        count: values (samples x points) behind each.
        split: the part of the data they were taken from.

    Raises:
        DataError: a channel that never changes (its std is 0), or lengths that differ.
    """

    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    split: str

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std):
            raise DataError(f"statistics: {len(self.channels)} channels, {len(self.mean)} means, {len(self.std)} stds")
        for name, mean, std in zip(self.channels, self.mean, self.std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise DataError(
                    f"channel {name!r} has mean {mean:g} and std {std:g}: it cannot be normalised; leave it out"
                )

    def select(self, channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std [C, 1, 1] float32 of the named channels.

        Raises:
            DataError: statistics of another channel set.
        """
        for name in channels:
            if name not in self.channels:
                raise DataError(
                    f"the statistics are of other channels: they lack {name!r}; {layout.nearest(name, self.channels)}. "
                    "Compute them from the store in use"
                )
        places = [self.channels.index(name) for name in channels]
        mean, std = (np.array(values, dtype=np.float32)[places, None, None] for values in (self.mean, self.std))
        return mean, std

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        path = Path(path)
        channels = {n: {"mean": m, "std": s} for n, m, s in zip(self.channels, self.mean, self.std, strict=True)}
        text = json.dumps({"channels": channels, "count": self.count, "split": self.split}, indent=1)
        partial = path.with_name(path.name + layout.PARTIAL_SUFFIX)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read the JSON file.

        Raises:
            DataError: missing, or not statistics.
        """
        try:
            content = json.loads(Path(path).read_text())
            channels = content["channels"]
            mean, std = (tuple(float(entry[key]) for entry in channels.values()) for key in ("mean", "std"))
            return cls(tuple(channels), mean, std, int(content["count"]), str(content["split"]))
        except OSError as error:
            raise DataError(f"cannot read statistics {path}: {error.strerror}; compute them again") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} does not hold statistics ({error}); compute them again") from error


def compute_statistics(store: Store, split: Split, channels: Sequence[str] | None = None) -> Statistics:
    """Statistics over every stored field of a split (the training split: nothing else may be known to a model).

    Args:
        store: the data.
        split: the fields to go over.
        channels: which channels, all when None.

    Raises:
        DataError: an empty split, an unknown channel, a channel that never changes.
    """
    names = tuple(store.channels if channels is None else channels)
    rows = np.flatnonzero(split.mask(store.coords))
    if not len(rows):
        raise DataError(f"split {split.text!r} holds no field of {store.path}; nothing to take statistics of")
    height, width = store.grid.shape
    slab = max(1, _SLAB_BYTES // (8 * len(names) * height * width))
    total: Moments | None = None
    for first in range(0, len(rows), slab):
        moments = Moments.of(store.read(rows[first : first + slab], names))
        total = moments if total is None else total.merge(moments)
    assert total is not None
    std = np.sqrt(total.squares / total.count)
    return Statistics(names, tuple(total.mean.tolist()), tuple(std.tolist()), total.count, split.text)
