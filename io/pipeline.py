"""From rows of a store to batches of tensors, read ahead while the model computes.

One background thread fetches the next batches (plain reads that let go of Python's lock, and numpy: torch's own threads
are left to the model). The samples and their order come from :mod:`smoe_hpc.io.samples` and do not depend on the
thread.

Dimensions: B batch, C input channels (input fields x channels, oldest field first), Ct target channels, H latitude
rows, W longitude columns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.samples import (
    Split,
    Window,
    batch_positions,
    epoch_order,
    evaluation_batches,
    sample_rows,
    steps_per_epoch,
)
from smoe_hpc.io.statistics import Statistics
from smoe_hpc.io.store import Store

PREFETCH = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side.

    Args:
        inputs: [B, C, H, W].
        targets: [B, Ct, H, W].
        ids: [B] int64 number of each sample within its split; -1 where a batch was filled up (all zeros, to be masked).
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor

    @property
    def valid(self) -> Tensor:
        """[B] bool: which entries are samples."""
        return self.ids >= 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same on a device; inputs and targets in ``dtype`` when given."""
        return replace(
            self,
            inputs=self.inputs.to(device=device, dtype=dtype),
            targets=self.targets.to(device=device, dtype=dtype),
            ids=self.ids.to(device=device),
        )


class Samples:
    """The samples of one split, by number.

    Args:
        store: the data.
        window: which fields make a sample.
        split: the part of the store; all of it when None.
        input_channels: names, all when None.
        target_channels: names, all when None; they need not be inputs.
        statistics: what normalises inputs and targets, ``(x - mean) / std`` by channel; None leaves them in their
            units.

    Attributes:
        input_rows: [S, I] and target_rows [S]: rows of the store behind each sample.
        target_mean, target_std: [Ct, 1, 1] float32 tensors that bring targets back to their units (0 and 1 without
            statistics).

    Raises:
        DataError: no sample in the split, an unknown channel, statistics of other channels.
    """

    def __init__(
        self,
        store: Store,
        window: Window,
        split: Split | None = None,
        input_channels: Sequence[str] | None = None,
        target_channels: Sequence[str] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.store, self.window, self.split, self.statistics = store, window, split, statistics
        self.input_channels = list(store.channels if input_channels is None else input_channels)
        self.target_channels = list(store.channels if target_channels is None else target_channels)
        store.channel_indices([*self.input_channels, *self.target_channels])
        self.input_rows, self.target_rows = sample_rows(store.coords, window, split)
        self._input_scaling = _scaling(statistics, self.input_channels)
        self._target_scaling = _scaling(statistics, self.target_channels)
        self.target_mean, self.target_std = (torch.from_numpy(part.copy()) for part in self._target_scaling)

    def __len__(self) -> int:
        return len(self.target_rows)

    @property
    def grid(self) -> Grid:
        """The points of inputs and targets."""
        return self.store.grid

    @property
    def in_channels(self) -> int:
        """C: channels of ``inputs``."""
        return len(self.window.inputs) * len(self.input_channels)

    @property
    def out_channels(self) -> int:
        """Ct: channels of ``targets``."""
        return len(self.target_channels)

    def fetch(self, sample_ids: Sequence[int] | np.ndarray) -> Batch:
        """The named samples, decoded and normalised, float32 and contiguous.

        Args:
            sample_ids: [B] numbers from 0 to S - 1; -1 gives zeros.

        Raises:
            DataError: a number out of range, or a store that cannot be read.
        """
        ids = np.array(sample_ids, dtype=np.int64).reshape(-1)
        if len(ids) and not (int(ids.min()) >= -1 and int(ids.max()) < len(self)):
            raise DataError(f"sample {int(ids.max())} does not exist; there are {len(self)} (0 to {len(self) - 1})")
        real = ids >= 0
        inputs = np.zeros((len(ids), len(self.window.inputs), len(self.input_channels), *self.grid.shape), np.float32)
        targets = np.zeros((len(ids), len(self.target_channels), *self.grid.shape), np.float32)
        self._fill(inputs, real, self.input_rows[ids[real]], self.input_channels, self._input_scaling)
        self._fill(targets, real, self.target_rows[ids[real]], self.target_channels, self._target_scaling)
        flat = inputs.reshape(len(ids), self.in_channels, *self.grid.shape)
        return Batch(torch.from_numpy(flat), torch.from_numpy(targets), torch.from_numpy(ids))

    def _fill(
        self,
        fields: np.ndarray,
        real: np.ndarray,
        rows: np.ndarray,
        channels: Sequence[str],
        scaling: tuple[np.ndarray, np.ndarray],
    ) -> None:
        shape = (rows.size, len(channels), *self.grid.shape)
        if real.all():  # the usual batch: read in place
            values = self.store.read(rows.reshape(-1), channels, out=fields.reshape(shape))
        else:
            values = self.store.read(rows.reshape(-1), channels)
        if self.statistics is not None:
            mean, std = scaling
            np.subtract(values, mean, out=values)
            np.divide(values, std, out=values)
        if not real.all():
            fields[real] = values.reshape(-1, *fields.shape[1:])


def _scaling(statistics: Statistics | None, channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if statistics is None:
        shape = (len(channels), 1, 1)
        return np.zeros(shape, np.float32), np.ones(shape, np.float32)
    return statistics.select(channels)


def train_batches(
    samples: Samples,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    global_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """One rank's micro-batches of one epoch, from a step on: ``accumulation`` of them make a step.

    The last, incomplete global batch of an epoch is dropped, so every rank has the same number of steps. Close the
    iterator (or let it be collected) to end its thread early.

    Raises:
        DataError: a batch that does not divide, or that the samples do not fill; while iterating, what reading raises.
    """
    steps = steps_per_epoch(len(samples), global_batch)
    order = epoch_order(len(samples), seed, epoch)
    positions = [
        batch_positions(len(samples), global_batch, accumulation, rank, world, s) for s in range(start_step, steps)
    ]
    return _prefetch(samples.fetch, [order[micro] for step in positions for micro in step])


def validation_batches(samples: Samples, *, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """One rank's batches of all samples in order: each sample once over all ranks, equal steps; mask by ``valid``."""
    return _prefetch(samples.fetch, list(evaluation_batches(len(samples), batch, rank, world)))


def _prefetch(fetch: Callable[[np.ndarray], Batch], wanted: Iterable[np.ndarray]) -> Iterator[Batch]:
    """``map(fetch, wanted)`` with up to ``PREFETCH`` batches made ahead by a thread that ends with the iterator."""
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def work() -> None:
        try:
            for ids in wanted:
                batch = fetch(ids)
                if stop.is_set():
                    return
                made.put(batch)
                if stop.is_set():
                    return
            made.put(None)
        except BaseException as error:  # the consumer raises it
            made.put(error)

    thread = threading.Thread(target=work, name="smoe-prefetch", daemon=True)
    thread.start()
    try:
        while (batch := made.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
        while thread.is_alive():  # it may wait for room in the queue
            try:
                made.get_nowait()
            except queue.Empty:
                thread.join(0.005)
