"""From ids of samples to stored fields in memory that is used again and again.

A batch is made in three steps, apart from each other: `FrameTable.plan` (pure) says which rows of the store it needs and how
its samples are put together from them; `read_frames` brings those rows, each once and in the type they are stored in, into
memory that it is given; the consumer decodes them (:mod:`smoe_hpc.io.loading.decoding`). Nothing here knows torch, so
that processes which only read stay small.

Dimensions: S starts, I input fields, L leads, B samples of a batch, D leads of a sample (L where they are stacked, 1 where
each sample has its own, 0 without targets), U and V distinct input and target fields of a batch, C and Ct channels read of
them, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.loading.batch_plan import BatchPlan
from smoe_hpc.io.sampling.coordinates import SECONDS_PER_HOUR
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.store.interface import FieldReader, is_sampled


@dataclass(frozen=True, eq=False)
class FrameTable:
    """What it takes to read samples, and nothing more; picklable.

    Args:
        store: the data.
        window: which fields make a sample.
        input_rows: [S, I] int64.
        target_rows: [S, L] int64; [S, 0] where there are no targets.
        input_channels: C names.
        target_channels: Ct names.
    """

    store: FieldReader
    window: Window
    input_rows: np.ndarray
    target_rows: np.ndarray
    input_channels: list[str]
    target_channels: list[str]

    @property
    def num_ids(self) -> int:
        """Ids there are: S, or S * L."""
        return len(self.input_rows) * (len(self.window.leads) if self.window.by_lead else 1)

    @property
    def inputs_each(self) -> int:
        """I."""
        return int(self.input_rows.shape[1])

    @property
    def targets_each(self) -> int:
        """D."""
        return min(1, self.target_rows.shape[1]) if self.window.by_lead else int(self.target_rows.shape[1])

    def rows_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input rows [n, I], target rows [n, D] and lead [n] (0 where all samples have the same) of ids, none of them -1.

        Raises:
            DataError: an id out of range.
        """
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.num_ids):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DataError(f"sample {bad} does not exist; there are {self.num_ids} (0 to {self.num_ids - 1})")
        if not self.window.by_lead:
            return self.input_rows[ids], self.target_rows[ids], np.zeros(len(ids), dtype=np.int64)
        starts, which = np.divmod(ids, len(self.window.leads))
        leads = np.array(self.window.leads, dtype=np.int64)[which]
        targets = self.target_rows[starts, which][:, None] if self.targets_each else self.target_rows[starts]
        return self.input_rows[starts], targets, leads

    def plan(self, ids: np.ndarray) -> BatchPlan:
        """How a batch is read and made.

        Args:
            ids: [B] int64; -1 fills up.

        Raises:
            DataError: an id out of range.
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        real = ids >= 0
        whole = bool(real.all())
        if not whole and int(ids.min()) < -1:
            raise DataError(f"sample {int(ids.min())} does not exist; ids start at 0, and -1 fills up a batch")
        inputs, targets, real_leads = self.rows_of(ids if whole else ids[real])
        rows, index = _distinct(inputs)
        target_rows, target_of = _distinct(targets)
        lists = np.zeros((1 + inputs.shape[1] + targets.shape[1], len(ids)), dtype=np.int64)
        lists[:, real] = np.concatenate([real_leads[None], index.T, target_of.T])
        return BatchPlan(rows, target_rows, ids, lists[0], lists[1 : 1 + inputs.shape[1]], lists[1 + inputs.shape[1] :])

    def starts_of(self, plan: BatchPlan) -> dict[str, np.ndarray]:
        """Coordinates of each sample's start, from which its leads count.

        Returns:
            ``time`` [B] datetime64[s], or ``run``, ``step`` and what else names a sample, [B] int64. NaT and -1 where a batch
            was filled up.
        """
        filled = plan.ids < 0
        rows = plan.rows[plan.input_index[-1]] if len(plan.rows) else np.zeros(len(filled), dtype=np.int64)
        found = {}
        for name, values in self.store.coords.items():
            at = values[rows]
            if name == "time":
                at = at - np.timedelta64(self.window.inputs[-1] * SECONDS_PER_HOUR, "s")
            elif name == "step" and "time" not in self.store.coords:
                at = at - self.window.inputs[-1]
            at[filled] = np.datetime64("NaT") if name == "time" else -1
            found[name] = at
        return found


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows, and the index of each of [n, k] among them; left as they are where all are distinct.

    >>> [part.tolist() for part in _distinct(np.array([[3, 4], [4, 5]]))]
    [[3, 4, 5], [[0, 1], [1, 2]]]
    >>> [part.tolist() for part in _distinct(np.array([[7, 8], [1, 2]]))]
    [[7, 8, 1, 2], [[0, 1], [2, 3]]]
    """
    flat = rows.reshape(-1)
    if len(set(flat.tolist())) == flat.size:  # as in most batches of a shuffled epoch
        return flat, np.arange(flat.size, dtype=np.int64).reshape(rows.shape)
    distinct, index = np.unique(flat, return_inverse=True)
    return distinct, index.reshape(rows.shape)


def read_frames(
    table: FrameTable,
    rows: tuple[np.ndarray, np.ndarray],
    out: tuple[np.ndarray, np.ndarray],
    verify: str = "off",
    helpers: Executor | None = None,
    workers: int = 1,
) -> None:
    """Read rows of inputs and of targets into given memory.

    Args:
        table: the store and the channels.
        rows: [U] of the inputs and [V] of the targets.
        out: [U, C, H, W] and [V, Ct, H, W] of the stored type, to be filled.
        verify: verify checksums: "off", "sampled" (a fixed pseudo-random 1 in 64 rows), "all".
        helpers: threads that share the rows with the caller; it reads alone without them.
        workers: how many there are, the caller among them.

    Raises:
        DataError: what the store raises; no thread writes into the memory any more.
    """
    channels = table.input_channels, table.target_channels
    pieces = [
        (rows[kind][part], channels[kind], out[kind][part]) for kind in (0, 1) for part in _shares(len(rows[kind]), workers)
    ]
    others = [helpers.submit(_read_piece, table, verify, *piece) for piece in pieces[1:]] if helpers else []
    try:
        for piece in pieces[:1] if helpers else pieces:
            _read_piece(table, verify, *piece)
    finally:
        wait(others)
    for other in others:
        other.result()


def _read_piece(table: FrameTable, verify: str, rows: np.ndarray, channels: Sequence[str], out: np.ndarray) -> None:
    if verify != "sampled":
        table.store.read_stored(rows, channels, out, check=verify == "all")
        return
    chosen = is_sampled(rows)
    cuts = [0, *(np.flatnonzero(chosen[1:] != chosen[:-1]) + 1).tolist(), len(rows)]
    for first, end in pairwise(cuts):
        table.store.read_stored(rows[first:end], channels, out[first:end], check=bool(chosen[first]))


def _shares(count: int, parts: int) -> list[slice]:
    """``count`` things cut into at most ``parts`` even shares, none empty.

    >>> _shares(5, 2), _shares(1, 3)
    ([slice(0, 2, None), slice(2, 5, None)], [slice(0, 1, None)])
    """
    cuts = sorted({count * part // parts for part in range(parts + 1)})
    return [slice(first, end) for first, end in pairwise(cuts)]
