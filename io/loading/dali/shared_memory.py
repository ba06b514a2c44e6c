"""Whether there is enough memory for DALI to share with its processes: in a container /dev/shm has 64 MB by default.

The system gives the names of such memory for nothing and ends the process that writes to what is not there. So it is
counted before.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from smoe_hpc.errors import LaunchError
from smoe_hpc.io.loading.frames import FrameTable
from smoe_hpc.launch.ranks import find_ranks

FOLDER = Path("/dev/shm")
_MARGIN = 1 << 20  # bytes for DALI's own messages


@dataclass(frozen=True)
class Room:
    """Shared memory of this machine, in bytes: what is free, and in all."""

    free: int
    size: int

    @classmethod
    def of(cls, folder: Path) -> Room | None:
        """Of the file system of a folder; None where the system does not say."""
        try:
            status = os.statvfs(folder)
        except OSError:
            return None
        return cls(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)

    def each(self, processes: int) -> int:
        """Bytes that each of several processes may take, whichever starts first."""
        return min(self.free, self.size // processes)


def needed(batch_bytes: int, batches: int) -> int:
    """Bytes of shared memory for a number of batches.

    >>> needed(10_000_000, 3)
    31048576
    """
    return batch_bytes * batches + _MARGIN


def batches_ahead(batch_bytes: int, wanted: int, more: int, there: int) -> int:
    """How many batches can be read ahead, at most as many as are wanted, with ``more`` beside them; 0 if not one.

    >>> [batches_ahead(10_000_000, 4, 1, there) for there in (64_000_000, 64_000_000 // 2, 20_000_000)]
    [4, 2, 0]
    """
    return max(min(wanted, (there - _MARGIN) // max(batch_bytes, 1) - more), 0)


class Budget:
    """What one pipeline takes of it.

    Args:
        table: what is read.
        pieces: that a batch is cut into, alike in size.
        ahead: batches that are to be read ahead.
        queue: batches in the pipeline beside them.
    """

    def __init__(self, table: FrameTable, pieces: int, ahead: int, queue: int) -> None:
        self._table, self._pieces, self._wanted, self._queue = table, pieces, ahead, queue
        self._ahead, self._taken = ahead, 0

    def lacks(self, batch: int) -> str | None:
        """What is wrong where there is too little for batches of that many samples; None if there is enough."""
        there, size = _there(), self._bytes(batch)
        if there is None:
            return None
        if not self._taken:
            need, enough = needed(size, 1 + self._queue), batches_ahead(size, self._wanted, self._queue, there) > 0
        else:
            need = needed(size, self._ahead + self._queue) - self._taken
            enough = need <= there
        if enough:
            return None
        return (
            f"{FOLDER} has {there / 1e6:,.1f} MB for this process and DALI needs {need / 1e6:,.1f} MB of it: give it more "
            "(docker run --shm-size=1g, or mount -o remount,size=1g), lower training.batch, or set loader.backend=threads"
        )

    def take(self, batch: int) -> int:
        """Take what is needed for batches of that many samples, where nothing is lacking; how many are read ahead."""
        there, size = _there(), self._bytes(batch)
        if not self._taken:
            self._ahead = self._wanted
            if there is not None:
                self._ahead = max(batches_ahead(size, self._wanted, self._queue, there), 1)
            if there is not None and self._ahead < self._wanted:
                warnings.warn(
                    f"{FOLDER} has {there / 1e6:,.1f} MB for this process: loader.prefetch={self._ahead} serves instead of "
                    f"{self._wanted}; give it more (docker run --shm-size=1g, or mount -o remount,size=1g)",
                    stacklevel=3,
                )
        self._taken = max(self._taken, needed(size, self._ahead + self._queue))
        return self._ahead

    def give_back(self) -> None:
        """The pipeline has ended."""
        self._taken = 0

    def _bytes(self, batch: int) -> int:
        """Of the fields of a batch as they are stored, at most."""
        table = self._table
        of_samples = (
            (table.inputs_each, len(table.input_channels)),
            (table.targets_each, len(table.target_channels)),
        )
        numbers = sum(-(-batch * each // self._pieces) * self._pieces * channels for each, channels in of_samples)
        return numbers * math.prod(table.store.grid.shape) * table.store.encoding.stored_type.itemsize


def _there() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    room = Room.of(FOLDER)
    if room is None:
        return None
    try:
        return room.each(find_ranks(os.environ).local_world)
    except LaunchError:  # reported where the processes of a job are joined
        return room.free
