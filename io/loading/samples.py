"""The samples of a split, by id: which there are, in which order, and what is in them.

`Samples` knows everything about its samples but how they are brought in: :mod:`smoe_hpc.io.loading.loader` reads ahead, in
threads or through DALI. `Samples.fetch` is the short way to a few of them.

Dimensions: B batch, S starts, I input fields, L leads, C input channels, Ct target channels, K constants, H latitude
rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.io.finite import find_not_finite
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.constants import normalised_constants
from smoe_hpc.io.loading.decoding import Decoder, scaling_of
from smoe_hpc.io.loading.fetching import fetch
from smoe_hpc.io.loading.frames import FrameTable
from smoe_hpc.io.sampling.gaps import refuse_gaps
from smoe_hpc.io.sampling.order import Order, drawn_leads
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window, sample_rows
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.store.interface import FieldReader


class Samples:
    """The samples of one split.

    An *id* is one int64 that names a sample whatever the epoch: the number of its start, or ``start * L + lead index`` where
    each sample has a lead of its own (`Window.mode` "drawn" or "each").

    Args:
        store: the data.
        window: which fields make a sample.
        split: the part of the store; all of it when None.
        input_channels: names, all when None.
        target_channels: names, all when None; they need not be inputs.
        statistics: what normalises inputs and targets, ``(x - mean) / std`` by channel; None leaves them in their
            units.
        constants: names of constant fields that follow the inputs, each normalised by its own mean and standard
            deviation over the grid.
        order: how an epoch mixes its samples.
        gaps: "refuse" times that are missing within the split, or "skip" the samples that need them.

    Attributes:
        table: rows of the store behind each id.
        target_mean, target_std: [out_channels, 1, 1] float32 tensors that bring targets back to their units (0 and 1
            without statistics).

    Raises:
        DataError: no sample in the split, an unknown channel or constant, statistics of other channels, times missing
            where that is refused, a constant that is the same everywhere.
    """

    def __init__(
        self,
        store: FieldReader,
        window: Window,
        split: Split | None = None,
        input_channels: Sequence[str] | None = None,
        target_channels: Sequence[str] | None = None,
        statistics: Statistics | None = None,
        *,
        constants: Sequence[str] = (),
        order: Order | None = None,
        gaps: Literal["refuse", "skip"] = "skip",
    ) -> None:
        self.store, self.window, self.split, self.statistics = store, window, split, statistics
        self.input_channels = list(store.channels if input_channels is None else input_channels)
        self.target_channels = list(store.channels if target_channels is None else target_channels)
        self.constants, self.order = tuple(constants), Order() if order is None else order
        indices = [store.channel_indices(names) for names in (self.input_channels, self.target_channels)]
        if gaps == "refuse":
            refuse_gaps(store.coords, split, store.describe_row)
        rows = sample_rows(store.coords, window, split)
        self.table = FrameTable(store, window, *rows, self.input_channels, self.target_channels)
        self._input_scaling = scaling_of(store.encoding.select(indices[0]), statistics, self.input_channels)
        self._target_scaling = scaling_of(store.encoding.select(indices[1]), statistics, self.target_channels)
        self._constants = normalised_constants(store, self.constants)
        self.target_mean, self.target_std = _units(statistics, self.target_channels, self.table.targets_each)

    def __len__(self) -> int:
        """Samples of an epoch of training: one a start, or one a start and lead."""
        return self.table.num_ids if self.window.mode == "each" else len(self.table.input_rows)

    @property
    def grid(self) -> Grid:
        """The points of inputs and targets."""
        return self.store.grid

    @property
    def input_rows(self) -> np.ndarray:
        """[S, I] rows of each start's input fields."""
        return self.table.input_rows

    @property
    def target_rows(self) -> np.ndarray:
        """[S] row of each start's target at the first lead."""
        return self.table.target_rows[:, 0]

    @property
    def in_channels(self) -> int:
        """Channels of ``inputs``: I * C + K, and one more where each sample has a lead of its own."""
        return len(self.window.inputs) * len(self.input_channels) + len(self.constants) + int(self.window.by_lead)

    @property
    def out_channels(self) -> int:
        """Channels of ``targets``: Ct, times L where leads are stacked."""
        return len(self.target_channels) * self.table.targets_each

    @property
    def newest(self) -> list[int] | None:
        """Input channel that holds the newest field of each target; None where an input lacks a target."""
        if not set(self.target_channels) <= set(self.input_channels):
            return None
        first = (len(self.window.inputs) - 1) * len(self.input_channels)
        return [first + self.input_channels.index(name) for name in self.target_channels] * self.table.targets_each

    @property
    def target_names(self) -> list[str]:
        """Name of each target channel, e.g. ``z500``; with its lead, e.g. ``z500_72h``, where several are stacked."""
        if self.table.targets_each == 1:
            return list(self.target_channels)
        unit = "h" if "time" in self.store.coords else "steps"
        return [f"{name}_{lead}{unit}" for lead in self.window.leads for name in self.target_channels]

    def epoch_ids(self, seed: int, epoch: int) -> np.ndarray:
        """[samples] int64 ids of an epoch in the order of training, by (seed, epoch) and nothing else."""
        starts = len(self.table.input_rows)
        if not self.window.by_lead:
            return self.order.starts(starts, seed, epoch)
        leads = len(self.window.leads)
        if self.window.mode == "drawn":
            order = self.order.starts(starts, seed, epoch)
            return order * leads + drawn_leads(starts, leads, seed, epoch)[order]
        return self.order.starts(starts * leads, seed, epoch)

    def all_ids(self) -> np.ndarray:
        """Every id once, in the order of the store: what an evaluation goes over (drawn leads too are all evaluated)."""
        return np.arange(self.table.num_ids, dtype=np.int64)

    def find_not_finite(self, ids: Sequence[int] | np.ndarray) -> str | None:
        """Name the first stored value behind some ids that is not finite: file, time, channel, point; None if all are."""
        inputs, targets, _ = self.table.rows_of(np.asarray(ids, dtype=np.int64).reshape(-1))
        for rows, channels in ((inputs, self.input_channels), (targets, self.target_channels)):
            for row in np.unique(rows).tolist():
                found = find_not_finite(self.store.read([row], channels)[0], channels, self.grid)
                if found:
                    return f"{self.store.describe_row(row)}, {found[0]}"
        return None

    @property
    def constant_fields(self) -> Tensor:
        """[K, H, W] float32: the constants as inputs have them, normalised."""
        return self._constants

    def decoder(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """What makes batches of these samples from what was read."""
        return Decoder(self.table, self._input_scaling, self._target_scaling, self._constants, device, dtype)

    def fetch(self, ids: Sequence[int] | np.ndarray) -> Batch:
        """The named samples, decoded and normalised, float32 and contiguous, on the CPU.

        Args:
            ids: [B]; -1 gives zeros.

        Raises:
            DataError: an id out of range, or a store that cannot be read.
        """
        return fetch(self.table, self.decoder(), np.array(ids, dtype=np.int64))


def _units(statistics: Statistics | None, channels: Sequence[str], times: int) -> tuple[Tensor, Tensor]:
    if statistics is None:
        return torch.zeros(len(channels) * times, 1, 1), torch.ones(len(channels) * times, 1, 1)
    mean, std = (torch.from_numpy(part.copy()).repeat(times, 1, 1) for part in statistics.select(channels))
    return mean, std
