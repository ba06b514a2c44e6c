"""What can be read like a store: one file (:mod:`smoe_hpc.io.store.reader`) or several (:mod:`smoe_hpc.io.store.multi_file`).

Readers give samples by row, in stored space: with a channel's transform still applied, as models take them. ``read``
decodes to float32; ``read_stored`` gives the stored numbers, for those who decode on another device.

Dimensions: T samples, n samples read, C channels read, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.names import known_names
from smoe_hpc.io.store.encoding import Encoding

VERIFY = ("off", "sampled", "all")
_SAMPLED_BITS = 6  # one row in 64
_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads neighbouring rows


class FieldReader(ABC):
    """Samples by row, from however many files; picklable, and safe to read from many threads.

    Attributes:
        path: the file, the folder or the pattern.
        grid: the points.
        channels: names of the stored channels, in order.
        units: one text a channel, of physical values.
        transforms: one text a channel, ``none`` or ``log:0.001``: what stands between physical and stored space.
        encoding: how values are stored.
        coords: ``time`` [T] datetime64[s], or ``run``, ``step``, ``member`` [T] int64.
        constants: name to [H, W], integers or float64.
        attributes: as given to the writer.
        num_samples: T.
    """

    path: Path
    grid: Grid
    channels: list[str]
    units: list[str]
    transforms: list[str]
    encoding: Encoding
    coords: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    attributes: dict[str, Any]
    num_samples: int

    @property
    @abstractmethod
    def direct(self) -> bool:
        """Whether samples are read at their offsets in the file, without HDF5's lock."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the files lie."""

    @abstractmethod
    def digest(self) -> str:
        """A sha256 of everything that is stored; of the fields, their checksums (4 bytes a sample are read)."""

    @abstractmethod
    def describe_row(self, row: int) -> str:
        """Name a sample for people: its file, and its time or its run and step."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; a later read opens them again."""

    @abstractmethod
    def _fill(self, rows: np.ndarray, indices: Sequence[int], out: np.ndarray, entries: np.ndarray, check: bool) -> None:
        """``out[entries[i]]`` = stored numbers of ``rows[i]``, channels of those indices; everything is known to fit."""

    def channel_indices(self, channels: Sequence[str]) -> list[int]:
        """Indices of the named channels, in their order.

        Raises:
            DataError: an unknown name, with the nearest known one.
        """
        known = {name: index for index, name in enumerate(self.channels)}
        for name in channels:
            if name not in known:
                raise DataError(f"{self.path} has no channel {name!r}; {known_names(name, self.channels)}")
        return [known[name] for name in channels]

    def read(
        self,
        rows: Sequence[int] | np.ndarray,
        channels: Sequence[str] | None = None,
        out: np.ndarray | None = None,
        check: bool = False,
    ) -> np.ndarray:
        """Samples by row in stored space, in the order asked for; a row may be asked for twice.

        Args:
            rows: [n] from 0 to T - 1.
            channels: names of the channels wanted, all when None.
            out: [n, C, H, W] float32, C-contiguous, to be filled instead of new memory (pinned or shared, say).
            check: hold the samples against their checksums.

        Returns:
            [n, C, H, W] float32.

        Raises:
            DataError: a row out of range, an unknown channel, a file that was changed, replaced or shortened since it was
                opened, a checksum that does not fit (verified with ``check``, and in compressed chunks).
        """
        if self.encoding.is_identity:
            return self.read_stored(rows, channels, out, check)
        rows, indices = self._checked_rows(rows), self._indices(channels)
        out = _memory(out, (len(rows), len(indices), *self.grid.shape), np.dtype(np.float32))
        encoding = self.encoding.select(indices)
        stored = np.empty((1, *out.shape[1:]), dtype=encoding.stored_type)
        first = np.zeros(1, dtype=np.int64)
        for n in range(len(rows)):
            self._fill(rows[n : n + 1], indices, stored, first, check)
            encoding.decode(stored, out[n : n + 1])
        return out

    def read_stored(
        self,
        rows: Sequence[int] | np.ndarray,
        channels: Sequence[str] | None = None,
        out: np.ndarray | None = None,
        check: bool = False,
    ) -> np.ndarray:
        """As :meth:`read`, but the numbers as they are stored: ``out`` and the result have ``encoding.stored_type``."""
        rows, indices = self._checked_rows(rows), self._indices(channels)
        out = _memory(out, (len(rows), len(indices), *self.grid.shape), self.encoding.stored_type)
        self._fill(rows, indices, out, np.arange(len(rows)), check)
        return out

    def _indices(self, channels: Sequence[str] | None) -> Sequence[int]:
        return range(len(self.channels)) if channels is None else self.channel_indices(channels)

    def _checked_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < self.num_samples):
            bad = int(rows.min()) if rows.min() < 0 else int(rows.max())
            raise DataError(f"{self.path} has no row {bad}; its samples are rows 0 to {self.num_samples - 1}")
        return rows

    def __len__(self) -> int:
        return self.num_samples

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _memory(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise DataError(f"out is {out.dtype} {out.shape}; it must be C-contiguous {dtype} {shape}")
    return out


def is_sampled(rows: np.ndarray) -> np.ndarray:
    """[n] bool: a fixed, pseudo-random 1 in 64 of all rows, the same everywhere and always.

    >>> int(is_sampled(np.arange(64_000)).sum())
    1000
    """
    mixed = np.asarray(rows).astype(np.uint64) * np.uint64(_MIX)
    return (mixed >> np.uint64(64 - _SAMPLED_BITS)) == 0


def check_verify(verify: str) -> str:
    """The text as it is.

    Raises:
        DataError: none of ``VERIFY``.
    """
    if verify not in VERIFY:
        raise DataError(f"verify={verify!r} is unknown; it is one of {', '.join(VERIFY)}")
    return verify
