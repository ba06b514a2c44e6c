"""How numbers are stored: float32 as they are, float16 and int16 by a scale and an offset per channel.

value = stored * scale + offset, with one scale and one offset a channel for a whole store (all its files), fixed
before the first value is seen: raw geopotential and solar radiation overflow float16. A value that does not fit is an
error; nothing is ever clipped. Zero is kept exactly where the bounds hold it (no rain stays no rain).

Dimensions: n samples, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from smoe_hpc.errors import DataError

STORED_TYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int16": np.dtype("<i2")}
_LARGEST: dict[str, float] = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "int16": 32767.0}

Describe = Callable[[int, int, int, int], str]


def check_type(dtype: str) -> None:
    """Raise a DataError unless it is the name of a type that stores hold."""
    if dtype not in STORED_TYPES:
        raise DataError(f"stored type {dtype!r} is unknown; it is one of {', '.join(STORED_TYPES)}")


@dataclass(frozen=True, eq=False)
class Encoding:
    """A stored type with scale and offset, checked.

    Args:
        dtype: ``"float32"``, ``"float16"`` or ``"int16"``.
        scale: [C] float64, positive.
        offset: [C] float64.

    Raises:
        DataError: an unknown type, lengths that differ, invalid numbers.
    """

    dtype: str
    scale: np.ndarray
    offset: np.ndarray

    def __post_init__(self) -> None:
        check_type(self.dtype)
        for name in ("scale", "offset"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if self.scale.ndim != 1 or self.scale.shape != self.offset.shape:
            raise DataError(f"scale {self.scale.shape} and offset {self.offset.shape} must be one number a channel each")
        if not (np.isfinite(self.scale).all() and np.isfinite(self.offset).all() and (self.scale > 0).all()):
            raise DataError("scales must be positive and, like offsets, finite; take them from bounds (Encoding.of_bounds)")

    @classmethod
    def identity(cls, channels: int) -> Encoding:
        """float32, stored as it is."""
        return cls("float32", np.ones(channels), np.zeros(channels))

    @classmethod
    def of_bounds(cls, dtype: str, low: Sequence[float], high: Sequence[float]) -> Encoding:
        """The finest encoding whose range holds low..high of each channel (float32 needs none).

        Raises:
            DataError: bounds that do not ascend.

        >>> Encoding.of_bounds("int16", [0.0], [65532.0]).scale
        array([1.])
        """
        lower, upper = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        if lower.shape != upper.shape or not (np.isfinite(lower) & np.isfinite(upper) & (lower < upper)).all():
            raise DataError(f"bounds {list(low)} and {list(high)} must be finite, the lower below the upper")
        if dtype == "float32":
            return cls.identity(len(lower))
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        zero_inside = (lower <= 0) & (upper >= 0)
        if dtype == "float16":  # finest near the offset
            offset = np.where(zero_inside, 0.0, middle)
            reach = np.where(zero_inside, np.maximum(-lower, upper), half)
            return cls(dtype, reach / _LARGEST[dtype], offset)
        scale = half / (_LARGEST["int16"] - 1)  # one step is left for moving zero onto a whole number
        return cls(dtype, scale, np.where(zero_inside, np.rint(middle / scale) * scale, middle))

    @property
    def stored_type(self) -> np.dtype:
        """What numpy calls it (little-endian)."""
        return STORED_TYPES[self.dtype]

    @property
    def is_identity(self) -> bool:
        """Whether stored numbers are the values themselves, in float32."""
        return self.dtype == "float32" and bool((self.scale == 1).all() and (self.offset == 0).all())

    @property
    def low(self) -> np.ndarray:
        """[C] float64: the smallest value that can be stored."""
        return self.offset - _LARGEST[self.dtype] * self.scale

    @property
    def high(self) -> np.ndarray:
        """[C] float64: the largest value that can be stored."""
        return self.offset + _LARGEST[self.dtype] * self.scale

    def select(self, indices: Sequence[int]) -> Encoding:
        """The same for some of the channels."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Encoding(self.dtype, self.scale[chosen], self.offset[chosen])

    def same_as(self, other: Encoding) -> bool:
        """Whether both store every value alike."""
        same_numbers = np.array_equal(self.scale, other.scale) and np.array_equal(self.offset, other.offset)
        return self.dtype == other.dtype and same_numbers

    def encode(self, values: np.ndarray, describe: Describe | None = None) -> np.ndarray:
        """Values to stored numbers, rounded to the nearest.

        Args:
            values: [n, C, H, W], finite.
            describe: names a value in an error by its index (n, c, i, j); the index itself when None.

        Returns:
            [n, C, H, W] of ``stored_type``.

        Raises:
            DataError: a value outside what the type can hold, named with the bounds.
        """
        if self.is_identity:
            return np.ascontiguousarray(values, dtype=self.stored_type)
        stored = np.empty(values.shape, dtype=self.stored_type)
        for channel in range(values.shape[1]):
            scaled = values[:, channel].astype(np.float64)
            scaled -= self.offset[channel]
            scaled /= self.scale[channel]
            if self.dtype == "int16":
                np.rint(scaled, out=scaled)
                fits = np.abs(scaled) <= _LARGEST["int16"]
                if fits.all():
                    stored[:, channel] = scaled
            else:
                with np.errstate(over="ignore"):
                    stored[:, channel] = scaled
                fits = np.isfinite(stored[:, channel])
            if not fits.all():
                self._refuse(values, channel, fits, describe)
        return stored

    def decode(self, stored: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Stored numbers [n, C, H, W] to float32 values, each the float32 nearest to stored * scale + offset.

        Args:
            stored: [n, C, H, W] of ``stored_type``.
            out: float32 memory of that shape, to be filled instead of new memory.
        """
        if out is None:
            out = np.empty(stored.shape, dtype=np.float32)
        if self.is_identity:
            out[...] = stored
            return out
        field = np.empty(stored.shape[2:], dtype=np.float64)  # one field at a time stays in the processor's cache
        for n in range(stored.shape[0]):
            for channel, (scale, offset) in enumerate(zip(self.scale.tolist(), self.offset.tolist(), strict=True)):
                np.multiply(stored[n, channel], scale, out=field, dtype=np.float64)
                np.add(field, offset, out=field)
                out[n, channel] = field
        return out

    def step(self, stored: np.ndarray, channel: int) -> np.ndarray:
        """How far apart values can be stored around stored numbers of one channel, float64 in stored space."""
        if self.dtype == "int16":
            return np.full(stored.shape, float(self.scale[channel]))
        return np.abs(np.spacing(stored)).astype(np.float64) * float(self.scale[channel])

    def _refuse(self, values: np.ndarray, channel: int, fits: np.ndarray, describe: Describe | None) -> None:
        n, i, j = (int(index) for index in np.argwhere(~fits)[0])
        where = describe(n, channel, i, j) if describe else f"sample {n}, channel {channel}, row {i}, column {j}"
        raise DataError(
            f"{where}: {float(values[n, channel, i, j]):g} is outside {self.low[channel]:g}..{self.high[channel]:g}, "
            f"what {self.dtype} holds here; nothing is clipped: correct the value, or choose wider bounds "
            "(Encoding.of_bounds) or float32"
        )
