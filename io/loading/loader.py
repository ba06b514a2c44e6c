"""Batches for training and evaluation, read ahead while the model computes.

A loader ties together which samples a rank takes (:mod:`smoe_hpc.io.sampling.order`), a backend that reads them and the
decoder. Which backend, how many workers and how far ahead changes nothing in the batches.

Dimensions: B samples of a micro-batch of this rank.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from typing import Any, Literal

import numpy as np
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.dali import backend as dali
from smoe_hpc.io.loading.decoding import StoredBatch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.loading.threads import ThreadBackend
from smoe_hpc.io.sampling.order import evaluation_batches, rank_positions

BACKENDS = ("threads", "dali", "auto")
Batches = Generator[Batch, None, None]
"""Batches in order; closing it (or letting it be collected) stops reading."""

_log = logging.getLogger(__name__)


class Loader:
    """Batches of samples, for one rank.

    Args:
        samples: what is read.
        backend: "threads", "dali" (processes of NVIDIA DALI), "auto" (dali where it is installed and has the shared
            memory that it needs).
        workers: threads or processes that read.
        prefetch: batches read ahead. Host memory for ``prefetch + 1`` batches of stored fields is held while the loader
            is open, on a GPU as much there.
        verify: verify checksums while reading: "off", "sampled" (1 field in 64), "all".
        device: where batches are wanted.
        rank: of this process.
        world: number of ranks.
        dtype: of inputs and targets.

    Attributes:
        backend: which one reads: "threads" or "dali".

    Raises:
        DataError: an invalid setting; dali where it is not installed.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        backend: Literal["threads", "dali", "auto"] = "threads",
        workers: int = 1,
        prefetch: int = 2,
        verify: Literal["off", "sampled", "all"] = "off",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if backend not in BACKENDS:
            raise DataError(f"loader.backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
        if workers < 1 or prefetch < 1:
            raise DataError(f"loader.workers={workers} and loader.prefetch={prefetch} must be 1 or more")
        self.samples, self._rank, self._world = samples, rank, world
        self._device, self._dtype = torch.device(device), dtype
        self._may_change = backend == "auto"
        self._options: dict[str, Any] = {"workers": workers, "prefetch": prefetch, "verify": verify, "device": self._device}
        kind = _backend_class(backend)
        self._reads: ThreadBackend | dali.DaliBackend = kind(samples.table, **self._options)
        self.backend = kind.name
        self._decoder = samples.decoder(self._device, dtype)

    def train(self, seed: int, epoch: int, start_step: int = 0, *, global_batch: int, accumulation: int = 1) -> Batches:
        """This rank's micro-batches of one epoch, from a step on: ``accumulation`` of them make a step.

        The last, incomplete global batch of an epoch is dropped, so every rank has the same number of steps.

        Raises:
            DataError: at once, a batch that does not divide, or that the samples do not fill; while iterating, what
                reading raises.
        """
        positions = rank_positions(len(self.samples), global_batch, accumulation, self._rank, self._world, start_step)
        return self.of(self.samples.epoch_ids(seed, epoch)[positions])

    def evaluate(self, batch: int) -> Batches:
        """This rank's batches of all samples in order: each once over all ranks, equal steps; mask by ``valid``.

        Args:
            batch: samples of a batch on each rank.

        Raises:
            DataError: as `train`.
        """
        return self.of(evaluation_batches(self.samples.table.num_ids, batch, self._rank, self._world))

    def of(self, ids: np.ndarray) -> Batches:
        """Batches of ids [batches, B] of one's own choice, in that order; -1 fills up.

        Raises:
            DataError: while iterating, what reading raises.
        """
        stored = self.stored(ids)
        try:
            for one in stored:
                yield self._decoder(one)
        finally:
            stored.close()

    def stored(self, ids: np.ndarray) -> Generator[StoredBatch, None, None]:
        """Batches of ids [batches, B] as they are stored, undecoded: what the backends can do, for measuring them.

        With "auto", threads take over from DALI where there is too little shared memory for it.

        Raises:
            DataError: while iterating, what reading raises.
        """
        if self._may_change and isinstance(self._reads, dali.DaliBackend):
            lack = self._reads.lacks(ids.shape[1])
            if lack is not None:
                warnings.warn(f"batches are read by threads: {lack}", stacklevel=2)
                self._reads.close()
                self._reads, self.backend = ThreadBackend(self.samples.table, **self._options), ThreadBackend.name
        return self._reads.deliver(ids)

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that read; none with threads, or before the first batch."""
        return self._reads.processes

    def close(self) -> None:
        """End threads and processes and give memory back; iterators must have been closed."""
        self._reads.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _backend_class(wanted: str) -> type[ThreadBackend] | type[dali.DaliBackend]:
    if wanted == "dali" or (wanted == "auto" and dali.installed()):
        return dali.DaliBackend
    if wanted == "auto":
        _log.info("batches are read by threads (loader.backend=threads), as NVIDIA DALI is not installed; %s", dali.REMEDY)
    return ThreadBackend
