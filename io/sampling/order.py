"""In which order the samples of a split are trained on, and which of them each rank takes.

Everything here is a pure function of (seed, epoch, rank, world, position): nothing depends on what happened before, so
that a run can be resumed at any step with any number of ranks.

Dimensions: S starts of samples, B global batch, R ranks, A accumulated micro-batches, b samples of a micro-batch of one
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from smoe_hpc.errors import DataError

LEAD_STREAM, BLOCK_STREAM, PHASE_STREAM = 1, 2, 3  # counters beside the order's own, which is keyed by (seed, epoch)


@dataclass(frozen=True)
class Order:
    """How an epoch's samples are mixed.

    Args:
        kind: "global" shuffles all starts; "blocks" shuffles runs of consecutive ones, so that the samples of a batch
            share stored fields, which are then read once.
        length: starts of a block; the cuts between blocks move from epoch to epoch.
    """

    kind: Literal["global", "blocks"] = "global"
    length: int = 32

    def __post_init__(self) -> None:
        if self.kind not in ("global", "blocks"):
            raise DataError(f"order {self.kind!r} is not known; choose global or blocks")
        if self.length < 1:
            raise DataError(f"blocks of {self.length} starts are not possible; give data.block=1 or more")

    def starts(self, num_starts: int, seed: int, epoch: int) -> np.ndarray:
        """[S] int64: every start once, in the epoch's order.

        >>> Order("blocks", 3).starts(8, seed=0, epoch=0).tolist(), Order("blocks", 3).starts(8, seed=0, epoch=1).tolist()
        ([4, 5, 6, 7, 1, 2, 3, 0], [6, 7, 0, 1, 2, 3, 4, 5])
        """
        if self.kind == "global":
            return epoch_order(num_starts, seed, epoch)
        phase = int(_raw(1, seed, epoch, PHASE_STREAM)[0] % np.uint64(self.length))
        block = (np.arange(num_starts, dtype=np.int64) + phase) // self.length
        rank_of_block = _raw(int(block[-1]) + 1 if num_starts else 0, seed, epoch, BLOCK_STREAM)
        return np.argsort(rank_of_block[block], kind="stable").astype(np.int64)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """[S] int64: every sample once, shuffled by (seed, epoch) and nothing else.

    Sorting a counter-based generator's raw numbers, unlike a library's shuffle, gives the same order in every version.

    >>> epoch_order(5, seed=0, epoch=0).tolist(), epoch_order(5, seed=0, epoch=1).tolist()
    ([0, 3, 1, 2, 4], [3, 4, 2, 1, 0])
    """
    return np.argsort(_raw(num_samples, seed, epoch), kind="stable").astype(np.int64)


def drawn_leads(num_starts: int, num_leads: int, seed: int, epoch: int) -> np.ndarray:
    """[S] int64: which lead each start is trained on in an epoch, by (seed, epoch, start) and nothing else.

    >>> drawn_leads(6, 3, seed=0, epoch=0).tolist(), drawn_leads(3, 3, seed=0, epoch=0).tolist()
    ([0, 1, 0, 2, 1, 1], [0, 1, 0])
    """
    return (_raw(num_starts, seed, epoch, LEAD_STREAM) % np.uint64(num_leads)).astype(np.int64)


def _raw(count: int, *key: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole batches in an epoch; what is left over waits for another epoch's order.

    Raises:
        DataError: not even one whole batch.
    """
    if num_samples < global_batch:
        raise DataError(f"{num_samples} samples do not fill one batch of {global_batch}; lower training.batch")
    return num_samples // global_batch


def batch_positions(
    num_samples: int, global_batch: int, accumulation: int, rank: int, world: int, step_in_epoch: int
) -> np.ndarray:
    """Positions in the epoch's order that one rank takes in one step.

    Returns:
        [A, B / (R A)] int64, one row a micro-batch. Those of all ranks, flattened and concatenated by rank, are the
        batch of a single process: ``step_in_epoch * B`` and on.

    Raises:
        DataError: a batch that ranks and micro-batches do not divide, or a step beyond the epoch.

    >>> batch_positions(100, 8, 2, rank=1, world=2, step_in_epoch=3).tolist()
    [[28, 29], [30, 31]]
    """
    steps = _check_shares(num_samples, global_batch, accumulation, rank, world)
    if not 0 <= step_in_epoch < steps:
        raise DataError(f"step {step_in_epoch} is outside the epoch's {steps} steps")
    share = global_batch // world
    first = step_in_epoch * global_batch + rank * share
    return np.arange(first, first + share, dtype=np.int64).reshape(accumulation, -1)


def rank_positions(
    num_samples: int, global_batch: int, accumulation: int, rank: int, world: int, start_step: int = 0
) -> np.ndarray:
    """Positions in the epoch's order that one rank takes from a step on to the epoch's end.

    Returns:
        [micro-batches, b] int64: `batch_positions` of the steps, one below the other; none from the last step on.

    >>> rank_positions(17, 8, 2, rank=1, world=2).tolist()
    [[4, 5], [6, 7], [12, 13], [14, 15]]
    """
    steps = _check_shares(num_samples, global_batch, accumulation, rank, world)
    parts = [batch_positions(num_samples, global_batch, accumulation, rank, world, s) for s in range(start_step, steps)]
    return np.concatenate(parts) if parts else np.zeros((0, global_batch // (world * accumulation)), np.int64)


def _check_shares(num_samples: int, global_batch: int, accumulation: int, rank: int, world: int) -> int:
    """Steps of an epoch, if the batch can be shared."""
    if global_batch < 1 or accumulation < 1 or not 0 <= rank < world:
        raise DataError(f"batch {global_batch}, accumulation {accumulation}, rank {rank} of {world} is not possible")
    if global_batch % (world * accumulation):
        raise DataError(
            f"training.batch={global_batch} is global and must be divisible by {world} ranks x {accumulation} "
            f"accumulation; try {-(-global_batch // (world * accumulation)) * world * accumulation}"
        )
    return steps_per_epoch(num_samples, global_batch)


def evaluation_batches(num_samples: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Samples that one rank evaluates, in order: over all ranks every sample exactly once.

    Args:
        num_samples: S.
        batch: samples of one batch on one rank.
        rank: this rank.
        world: R.

    Returns:
        [steps, batch] int64, the same shape on every rank; the last ones are filled with -1, to be masked.

    >>> [evaluation_batches(5, 2, rank, 2).tolist() for rank in (0, 1)]
    [[[0, 1], [4, -1]], [[2, 3], [-1, -1]]]
    """
    if batch < 1 or not 0 <= rank < world or num_samples < 1:
        raise DataError(f"cannot evaluate {num_samples} samples in batches of {batch} on rank {rank} of {world}")
    steps = -(-num_samples // (batch * world))
    samples = np.arange(steps * batch * world, dtype=np.int64)
    samples[num_samples:] = -1
    return samples.reshape(steps, world, batch)[:, rank]
