"""Batches for training and evaluation, read ahead while the model computes.

A loader ties together which items a rank takes (:mod:`smoe_hpc.io.order`), a front that reads them (:mod:`smoe_hpc.io.fronts`)
and the decoder. Which front, how many workers and how far ahead changes nothing in the batches.

Dimensions: B samples of a micro-batch of this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Any, Literal, Protocol

import numpy as np
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io.decoding import Raw
from smoe_hpc.io.fronts import dali
from smoe_hpc.io.fronts.plain import PlainFront
from smoe_hpc.io.order import epoch_order, evaluation_batches, rank_positions
from smoe_hpc.io.pipeline import Batch, Samples

FRONTS = ("plain", "dali", "auto")
Batches = Generator[Batch, None, None]
"""Batches in order; closing it (or letting it be collected) stops reading."""

_log = logging.getLogger(__name__)


class Fetchable(Protocol):
    """Samples that need no reading, as those made in memory: `Samples` is read ahead, others are fetched when wanted."""

    def __len__(self) -> int:
        """How many."""

    def fetch(self, items: Any) -> Any:
        """A `Batch` of the samples of these numbers."""


class Loader:
    """Batches of samples, for one rank.

    Args:
        samples: what is read.
        front: "plain" (threads), "dali" (processes of NVIDIA DALI), "auto" (dali where it is installed).
        workers: threads or processes that read.
        prefetch: batches read ahead. Host memory for ``prefetch + 1`` batches of stored fields is held while the loader
            is open, on a GPU as much there.
        verify: whose checksums are looked at while reading: "off" nobody's, "sampled" those of 1 field in 64, "all".
        device: where batches are wanted.
        rank: of this process.
        world: number of ranks.
        dtype: of inputs and targets.

    Attributes:
        front: which front reads: "plain", "dali", or "memory" where samples need no reading.

    Raises:
        DataError: a setting that cannot be; dali where it is not installed.
    """

    def __init__(
        self,
        samples: Samples | Fetchable,
        *,
        front: Literal["plain", "dali", "auto"] = "plain",
        workers: int = 1,
        prefetch: int = 2,
        verify: Literal["off", "sampled", "all"] = "off",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if front not in FRONTS:
            raise DataError(f"loader.front={front!r} is not known; choose one of {', '.join(FRONTS)}")
        if workers < 1 or prefetch < 1:
            raise DataError(f"loader.workers={workers} and loader.prefetch={prefetch} must be 1 or more")
        self.samples, self._rank, self._world = samples, rank, world
        self._device, self._dtype = torch.device(device), dtype
        self.front = "memory"
        self._reads: PlainFront | dali.DaliFront | None = None
        if isinstance(samples, Samples):
            options: dict[str, Any] = {"workers": workers, "prefetch": prefetch, "verify": verify, "device": self._device}
            kind = _front(front)
            self._reads, self.front = kind(samples.table, **options), kind.name
            self._decoder = samples.decoder(self._device, dtype)

    def train(
        self, seed: int, epoch: int, start_step: int = 0, *, global_batch: int, accumulation: int = 1
    ) -> Batches:
        """This rank's micro-batches of one epoch, from a step on: ``accumulation`` of them make a step.

        The last, incomplete global batch of an epoch is dropped, so every rank has the same number of steps.

        Raises:
            DataError: at once, a batch that does not divide, or that the samples do not fill; while iterating, what
                reading raises.
        """
        positions = rank_positions(len(self.samples), global_batch, accumulation, self._rank, self._world, start_step)
        return self.of(epoch_items(self.samples, seed, epoch)[positions])

    def evaluate(self, batch: int) -> Batches:
        """This rank's batches of all samples in order: each once over all ranks, equal steps; mask by ``valid``.

        Args:
            batch: samples of a batch on each rank.

        Raises:
            DataError: as `train`.
        """
        items = self.samples.all_items() if isinstance(self.samples, Samples) else np.arange(len(self.samples))
        positions = evaluation_batches(len(items), batch, self._rank, self._world)
        return self.of(np.where(positions < 0, -1, items[positions]))

    def raw(self, items: np.ndarray) -> Generator[Raw, None, None]:
        """Batches of items [batches, B] as they are read, undecoded: what the fronts can do, for measuring them.

        Raises:
            DataError: samples that need no reading; while iterating, what reading raises.
        """
        if self._reads is None:
            raise DataError("these samples are in memory: there is nothing to read")
        return self._reads.deliver(items)

    def of(self, items: np.ndarray) -> Batches:
        """Batches of items [batches, B] of one's own choice, in that order; -1 fills up.

        Raises:
            DataError: while iterating, what reading raises.
        """
        if self._reads is None:
            for part in items:
                yield self.samples.fetch(part).to(self._device, self._dtype)
            return
        raws = self._reads.deliver(items)
        try:
            for raw in raws:
                yield self._decoder(raw)
        finally:
            raws.close()

    def close(self) -> None:
        """End threads and processes and give memory back; iterators must have been closed."""
        if self._reads is not None:
            self._reads.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def epoch_items(samples: Samples | Fetchable, seed: int, epoch: int) -> np.ndarray:
    """[samples] int64: items of an epoch in the order of training."""
    if isinstance(samples, Samples):
        return samples.epoch_items(seed, epoch)
    return epoch_order(len(samples), seed, epoch)


def _front(wanted: str) -> type[PlainFront] | type[dali.DaliFront]:
    if wanted == "dali" or (wanted == "auto" and dali.installed()):
        return dali.DaliFront
    if wanted == "auto":
        _log.info("batches are read by threads (loader.front=plain), as NVIDIA DALI is not installed; %s", dali.REMEDY)
    return PlainFront
