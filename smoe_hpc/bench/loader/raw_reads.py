"""Bare reads of the bytes that batches are made of: what every reader is held against."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import h5py
import numpy as np

from smoe_hpc.io.loading.frames import FrameTable


def _pieces(table: FrameTable, ids: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(row, channel indices) that a batch needs, each row once."""
    plan = table.plan(ids)
    for rows, channels in ((plan.rows, table.input_channels), (plan.target_rows, table.target_channels)):
        indices = table.store.channel_indices(channels)
        for row in rows.tolist():
            yield row, indices


def bytes_read(table: FrameTable, ids: np.ndarray) -> int:
    """Bytes of the stored fields that a batch needs."""
    height, width = table.store.grid.shape
    field = height * width * table.store.encoding.stored_type.itemsize
    return sum(len(channels) * field for _, channels in _pieces(table, ids))


def raw_reads(table: FrameTable, ids: np.ndarray, workers: int) -> Iterator[None]:
    """The same bytes of the same files in the same order, by bare reads of as many threads, two batches ahead, into three
    batches' memory in turn: the fastest that a reader of whole batches can be. Offsets come from HDF5, not from the store.
    """
    field = table.store.grid.shape[0] * table.store.grid.shape[1] * table.store.encoding.stored_type.itemsize
    offsets, descriptors = _offsets(table)
    ring = [np.ones(max(bytes_read(table, part) for part in ids), dtype=np.uint8) for _ in range(3)]
    ahead: deque[list[Future[None]]] = deque()

    def read(share: list[tuple[int, int, int, int]], memory: np.ndarray) -> None:
        for file, offset, position, size in share:
            os.preadv(descriptors[file], (memory[position : position + size],), offset)

    def wait_for(reads: list[Future[None]]) -> None:
        for one in reads:
            one.result()

    with ThreadPoolExecutor(workers) as pool:
        for number, part in enumerate(ids):
            reads, position = [], 0
            for row, channels in _pieces(table, part):
                file, offset = offsets[row]
                for first, count in _runs(channels):
                    reads.append((file, offset + first * field, position, count * field))
                    position += count * field
            shares = [reads[worker::workers] for worker in range(workers)]
            ahead.append([pool.submit(read, share, ring[number % 3]) for share in shares])
            if len(ahead) == 3:  # the next batch takes the memory of the oldest
                wait_for(ahead.popleft())
                yield
        while ahead:
            wait_for(ahead.popleft())
            yield


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """(first, count) of neighbouring channels."""
    cuts = [0, *(i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices)]
    return [(indices[first], end - first) for first, end in pairwise(cuts)]


def _offsets(table: FrameTable) -> tuple[list[tuple[int, int]], list[int]]:
    """(file, offset) of every row of the series, and descriptors of its files."""
    offsets: list[tuple[int, int]] = []
    descriptors: list[int] = []
    for number, path in enumerate(sorted(table.store.folder.glob("*.h5"))):
        descriptors.append(os.open(path, os.O_RDONLY))
        with h5py.File(path, "r") as file:
            chunks: dict[int, int] = {}
            file["fields"].id.chunk_iter(lambda chunk, to=chunks: to.__setitem__(chunk.chunk_offset[0], chunk.byte_offset))
        offsets += [(number, chunks[row]) for row in range(len(chunks))]
    return offsets, descriptors
