"""From numbers of samples to stored fields in memory that is used again and again.

A batch is read in three steps, apart from each other: `FrameTable.need` (pure) says which rows of the store a batch needs
and how samples are put together from them; `Reader.read` brings those rows, each once, in the type they are stored in,
into memory that it is given; whoever has them then decodes (:mod:`smoe_hpc.io.decoding`). Nothing here knows torch, so
that processes which only read stay small.

Dimensions: S starts, I input fields, L leads, B samples of a batch, D leads of a sample (L where they are stacked, else
1), U and V distinct input and target fields of a batch, C and Ct channels read of them, H latitude rows, W longitude
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.fields import FieldReader, check_verify, is_sampled

HEADER = 2  # numbers before the lists of a layout


@dataclass(frozen=True, eq=False)
class FrameTable:
    """What it takes to read samples, and nothing more; picklable.

    An *item* is one number that says which sample is meant, whatever the epoch: the number of its start where all samples
    have the same leads, else ``start * L + lead index``. The item -1 fills up a batch.

    Args:
        store: the data.
        input_rows: [S, I] int64.
        target_rows: [S, L] int64.
        input_channels: C names.
        target_channels: Ct names.
        leads: L leads, in hours or steps.
        by_lead: whether each sample has one lead of its own.
    """

    store: FieldReader
    input_rows: np.ndarray
    target_rows: np.ndarray
    input_channels: list[str]
    target_channels: list[str]
    leads: tuple[int, ...]
    by_lead: bool

    @property
    def num_items(self) -> int:
        """Items there are: S, or S * L."""
        return len(self.input_rows) * (len(self.leads) if self.by_lead else 1)

    @property
    def inputs_each(self) -> int:
        """I."""
        return int(self.input_rows.shape[1])

    @property
    def targets_each(self) -> int:
        """D."""
        return 1 if self.by_lead else len(self.leads)

    def rows_of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input rows [n, I], target rows [n, D] and lead [n] (0 where all samples have the same) of items, none of them -1.

        Raises:
            DataError: a number out of range.
        """
        if len(items) and not (int(items.min()) >= 0 and int(items.max()) < self.num_items):
            bad = int(items.min()) if items.min() < 0 else int(items.max())
            raise DataError(f"sample {bad} does not exist; there are {self.num_items} (0 to {self.num_items - 1})")
        if not self.by_lead:
            return self.input_rows[items], self.target_rows[items], np.zeros(len(items), dtype=np.int64)
        starts, which = np.divmod(items, len(self.leads))
        leads = np.array(self.leads, dtype=np.int64)[which]
        return self.input_rows[starts], self.target_rows[starts, which][:, None], leads

    def need(self, items: np.ndarray) -> Need:
        """What a batch needs.

        Args:
            items: [B] int64; -1 fills up.

        Raises:
            DataError: a number out of range.
        """
        items = np.asarray(items, dtype=np.int64).reshape(-1)
        real = items >= 0
        whole = bool(real.all())
        if not whole and int(items.min()) < -1:
            raise DataError(f"sample {int(items.min())} does not exist; numbers start at 0, and -1 fills up a batch")
        inputs, targets, leads = self.rows_of(items if whole else items[real])
        frames, place = _once(inputs)
        target_frames, target_place = _once(targets)
        layout = np.zeros((len(items), 2 + inputs.shape[1] + targets.shape[1]), dtype=np.int64)
        layout[:, 0] = items
        layout[real, 1] = leads
        layout[real, 2 : 2 + inputs.shape[1]] = place
        layout[real, 2 + inputs.shape[1] :] = target_place
        in_order = [whole and len(frames) == inputs.size, whole and len(target_frames) == targets.size]
        header = np.concatenate([np.array(in_order, dtype=np.int64), layout.T.reshape(-1)])
        return Need(frames, target_frames, header)


@dataclass(frozen=True, eq=False)
class Need:
    """Rows of the store that a batch needs, each once, and how its samples are made of them.

    Args:
        rows: [U] of the inputs.
        target_rows: [V] of the targets.
        header: int64: whether inputs, and whether targets, need no gathering because each field is used once and in
            order (0 or 1); then item [B], lead [B], place of each input field among ``rows`` [I, B] and of each target
            among ``target_rows`` [D, B].
    """

    rows: np.ndarray
    target_rows: np.ndarray
    header: np.ndarray


def _once(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows, and the place of each of [n, k] among them; left as they are where all are distinct.

    >>> [part.tolist() for part in _once(np.array([[3, 4], [4, 5]]))]
    [[3, 4, 5], [[0, 1], [1, 2]]]
    >>> [part.tolist() for part in _once(np.array([[7, 8], [1, 2]]))]
    [[7, 8, 1, 2], [[0, 1], [2, 3]]]
    """
    flat = rows.reshape(-1)
    if len(set(flat.tolist())) == flat.size:  # as in most batches of a shuffled epoch
        return flat, np.arange(flat.size, dtype=np.int64).reshape(rows.shape)
    distinct, place = np.unique(flat, return_inverse=True)
    return distinct, place.reshape(rows.shape)


class Reader:
    """Reads rows into given memory, several threads sharing the rows of a batch.

    Args:
        table: what to read.
        workers: threads that read, the caller among them.
        verify: whose checksums are looked at: ``"off"`` nobody's, ``"sampled"`` those of a fixed pseudo-random 1 in 64
            rows, ``"all"``.

    Raises:
        DataError: an unknown ``verify``, less than one worker.
    """

    def __init__(self, table: FrameTable, workers: int = 1, verify: str = "off") -> None:
        if workers < 1:
            raise DataError(f"{workers} workers cannot read; give loader.workers=1 or more")
        self.table, self.verify, self._workers = table, check_verify(verify), workers
        self._pool = ThreadPoolExecutor(workers - 1, thread_name_prefix="smoe-read") if workers > 1 else None

    def read(self, need: Need, frames: np.ndarray, target_frames: np.ndarray) -> None:
        """Fill ``frames`` [U, C, H, W] and ``target_frames`` [V, Ct, H, W], both of the stored type.

        Raises:
            DataError: what the store raises; no thread writes into the memory any more.
        """
        table = self.table
        pieces = [
            (rows[part], channels, out[part])
            for rows, channels, out in (
                (need.rows, table.input_channels, frames),
                (need.target_rows, table.target_channels, target_frames),
            )
            for part in _shares(len(rows), self._workers)
        ]
        if self._pool is None:
            for piece in pieces:
                self._read_piece(*piece)
            return
        others: list[Future[None]] = [self._pool.submit(self._read_piece, *piece) for piece in pieces[1:]]
        try:
            for piece in pieces[:1]:
                self._read_piece(*piece)
        finally:
            wait(others)
        for other in others:
            other.result()

    def _read_piece(self, rows: np.ndarray, channels: Sequence[str], out: np.ndarray) -> None:
        if self.verify != "sampled":
            self.table.store.read_stored(rows, channels, out, check=self.verify == "all")
            return
        chosen = is_sampled(rows)
        cuts = [0, *(np.flatnonzero(chosen[1:] != chosen[:-1]) + 1).tolist(), len(rows)]
        for first, end in pairwise(cuts):
            self.table.store.read_stored(rows[first:end], channels, out[first:end], check=bool(chosen[first]))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def _shares(count: int, parts: int) -> list[slice]:
    """``count`` things cut into at most ``parts`` even shares, none empty.

    >>> _shares(5, 2), _shares(1, 3)
    ([slice(0, 2, None), slice(2, 5, None)], [slice(0, 1, None)])
    """
    cuts = sorted({count * part // parts for part in range(parts + 1)})
    return [slice(first, end) for first, end in pairwise(cuts)]
