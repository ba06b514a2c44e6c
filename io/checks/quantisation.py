"""What it costs to store a channel in 16 bits: the error of rounding, estimated from the stored numbers themselves.

Around a stored number the next ones lie a step away, so a value was moved by at most half a step, and by step / sqrt(12)
in root mean square if it could lie anywhere. Values that lie on a step (no rain, night) were not moved, so the estimate
is on the safe side.

Dimensions: C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smoe_hpc.io.statistics.moments import Moments
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.io.store.transforms import slope


@dataclass(frozen=True)
class Quantisation:
    """Error of one channel: root mean square in its units, and as a share of the channel's standard deviation.

    The share is of stored space, where models live (precipitation: of its logarithm).
    """

    rms: float
    units: str
    share_of_std: float


@dataclass(frozen=True, eq=False)
class Rounding:
    """Sums over sampled fields of one channel: squared error in stored space and in units, and the values' moments."""

    stored: float
    physical: float
    moments: Moments

    def merge(self, other: Rounding) -> Rounding:
        """Of both together."""
        return Rounding(self.stored + other.stored, self.physical + other.physical, self.moments.merge(other.moments))

    @staticmethod
    def add_sample(sums: dict[str, Rounding], store: FieldReader, stored: np.ndarray) -> None:
        """Add one sample [C, H, W], as it is stored, to the sums by channel."""
        values = store.encoding.decode(stored[None])
        for index, channel in enumerate(store.channels):
            squared = np.square(store.encoding.step(stored[index], index)) / 12
            in_units = squared * np.square(slope(store.transforms[index], values[0, index]))
            moments = Moments.of(values[:, index : index + 1])
            here = Rounding(float(squared.sum()), float(in_units.sum()), moments)
            sums[channel] = sums[channel].merge(here) if channel in sums else here


def merge_rounding(parts: list[dict[str, Rounding]], store: FieldReader) -> dict[str, Quantisation]:
    """The error of each channel from the sums of all ranks; NaN as the share of a channel that never changes."""
    found = {}
    for channel, units in zip(store.channels, store.units, strict=True):
        sums = [part[channel] for part in parts if channel in part]
        if not sums:
            continue
        total = sums[0]
        for one in sums[1:]:
            total = total.merge(one)
        count = total.moments.count
        std = math.sqrt(float(total.moments.squares[0]) / count)
        error = math.sqrt(total.stored / count)
        found[channel] = Quantisation(math.sqrt(total.physical / count), units, error / std if std > 0 else math.nan)
    return found
