"""What a store is to hold, checked before a byte is written, and how given values become stored numbers.

Dimensions: T samples of the store, n samples of a slab, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.channels import known_channel
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.encoding import Encoding, check_type
from smoe_hpc.io.store.transforms import NONE, apply, check_transforms


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that a store holds but its fields.

    Args:
        path: of the store, for errors.
        grid: (H, W) and where the points are.
        channels: C names, all different.
        units: one text a channel.
        coords: of the samples, as `layout.check_coords` gives them.
        constants: name to [H, W], finite.
        attributes: text and numbers.
        encoding: of C channels.
        transforms: one text a channel.

    Raises:
        DataError: parts that do not fit together.
    """

    path: Path
    grid: Grid
    channels: list[str]
    units: list[str]
    coords: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    attributes: dict[str, str | int | float]
    encoding: Encoding
    transforms: list[str]

    def __post_init__(self) -> None:
        for name, values in self.constants.items():
            if values.shape != self.grid.shape or not np.isfinite(values).all():
                raise DataError(f"constant {name!r} {values.shape} must be finite and of the grid's shape {self.grid.shape}")
        if clash := set(self.attributes) & set(layout.OWN_ATTRIBUTES):
            raise DataError(f"attributes {sorted(clash)} belong to the store itself; choose other names")

    @property
    def num_samples(self) -> int:
        """T."""
        return len(next(iter(self.coords.values())))

    @property
    def sample_bytes(self) -> int:
        """Of a sample in the file, without compression, its checksum included."""
        height, width = self.grid.shape
        return len(self.channels) * height * width * self.encoding.stored_type.itemsize + layout.CHECKSUM_BYTES

    def encode(self, first_row: int, values: np.ndarray) -> np.ndarray:
        """Stored numbers [n, C, H, W] of physical values [n, C, H, W], those of samples ``first_row`` and on.

        Raises:
            DataError: a value that is not finite, below the start of its transform, or outside what the encoding holds.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            slab = np.ascontiguousarray(values, dtype="<f4")
            # One sum is not finite as soon as one value is not; only then is it searched for.
            suspicious = not np.isfinite(slab.sum())
        if suspicious:
            self._require_finite(first_row, slab, "are not finite in float32")
        transformed = [channel for channel, transform in enumerate(self.transforms) if transform != NONE]
        if transformed:
            slab = slab.copy() if np.may_share_memory(slab, values) else slab  # the caller's memory stays as it is
            for channel in transformed:
                slab[:, channel] = apply(self.transforms[channel], values[:, channel])
            if not np.isfinite(slab[:, transformed]).all():
                ends = ", ".join(sorted({self.transforms[channel] for channel in transformed}))
                self._require_finite(first_row, slab, f"lie below the start of the transform {ends}")

        def describe(n: int, channel: int, i: int, j: int) -> str:
            return f"{self.path}: {self._describe_value(first_row + n, channel, i, j)}"

        return self.encoding.encode(slab, describe)

    def _describe_value(self, row: int, channel: int, i: int, j: int) -> str:
        sample = layout.describe_sample(self.coords, row)
        return f"{sample}, channel {self.channels[channel]!r}, lat {self.grid.lat[i]:g}, lon {self.grid.lon[j]:g}"

    def _require_finite(self, first_row: int, slab: np.ndarray, what: str) -> None:
        finite = np.isfinite(slab)
        if finite.all():  # only the sum had overflowed
            return
        n, channel, i, j = (int(index) for index in np.argwhere(~finite)[0])
        raise DataError(
            f"{self.path}: {int((~finite).sum())} values {what}, the first at "
            f"{self._describe_value(first_row + n, channel, i, j)}; "
            "a store holds whole fields: fill or drop them before converting"
        )


def require_channels(channels: Sequence[str], units: Sequence[str]) -> None:
    """Raise a DataError unless names are all different, at least one, and have one unit each."""
    if not channels or len(set(channels)) != len(channels) or len(units) != len(channels):
        raise DataError(f"channels {list(channels)} must be different names with one unit each, not {list(units)}")


def choose_encoding(
    channels: Sequence[str], dtype: str, encoding: Encoding | None, transforms: Sequence[str] | None
) -> tuple[Encoding, list[str]]:
    """Encoding and transforms as a writer is given them, completed by what is known of its channels where that is needed.

    Raises:
        DataError: an unknown type or transform, settings that contradict each other, or channels whose bounds are needed
            and not known.
    """
    check_type(dtype)
    if encoding is not None and dtype not in ("float32", encoding.dtype):
        raise DataError(f"dtype {dtype!r} and an encoding of {encoding.dtype} contradict each other; give one of them")
    if encoding is not None and len(encoding.scale) != len(channels):
        raise DataError(f"the encoding is of {len(encoding.scale)} channels, the store has {len(channels)}; make one of all")
    if encoding is not None or dtype == "float32":
        given = [NONE] * len(channels) if transforms is None else transforms
        return encoding or Encoding.identity(len(channels)), check_transforms(given, channels)
    known = []
    for name in channels:
        channel = known_channel(name)
        if channel is None:
            raise DataError(
                f"the bounds of channel {name!r} are not known, which {dtype} needs; "
                "give encoding=Encoding.of_bounds(dtype, low, high)"
            )
        known.append(channel)
    chosen = check_transforms([c.transform for c in known] if transforms is None else transforms, channels)
    for channel, transform in zip(known, chosen, strict=True):
        if channel.transform != transform:
            raise DataError(
                f"channel {channel.name!r} has known bounds after transform {channel.transform!r}, not {transform!r}; "
                "give that one, or encoding=Encoding.of_bounds(dtype, low, high)"
            )
    return Encoding.of_bounds(dtype, [c.low for c in known], [c.high for c in known]), chosen
