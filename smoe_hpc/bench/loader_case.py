"""One measurement of `smoe-hpc bench loader`, made in a process of its own.

A process of its own, so that memory and processor time are of this case alone, and no case profits from another's. What
is measured: how fast one rank gets its batches, from the first batch on (starting the workers is told apart).

Dimensions: S samples, B batch, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
import torch

from smoe_hpc.bench.loader_rivals import RIVALS, rival_batches
from smoe_hpc.bench.processes import MemoryWatch, processor_seconds
from smoe_hpc.io.loader import Loader
from smoe_hpc.io.order import Order
from smoe_hpc.io.pipeline import Samples
from smoe_hpc.io.reading import FrameTable
from smoe_hpc.io.samples import Window
from smoe_hpc.io.series import open_store
from smoe_hpc.io.statistics import Statistics
from smoe_hpc.training.memory import keep_freed_memory

INPUTS, LEAD, TARGETS = (-12, -6, 0), 72, ("z500", "t850", "t2m")
WARM_UP = 3  # batches before the clock starts


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        reader: "raw" (plain reads of the same bytes), "plain" or "dali" (our fronts), or a name of `RIVALS`.
        data: folder of a store.
        statistics: file of its statistics.
        order: "global" or "blocks".
        verify: "off", "sampled" or "all".
        decoded: whether batches are decoded, or delivered as stored.
        cache: "warm" reads everything once before, "cold" drops it from the page cache.
        batch: samples a batch.
        batches: how many are timed.
        workers: threads or processes that read.
        prefetch: batches read ahead.
        device: where batches are delivered.
    """

    reader: str
    data: str
    statistics: str
    order: str = "global"
    verify: str = "off"
    decoded: bool = True
    cache: str = "warm"
    batch: int = 32
    batches: int = 20
    workers: int = 2
    prefetch: int = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Args:
        case: what was measured.
        samples_per_second: delivered.
        read_mb_per_second: distinct bytes read from the files, in 10^6 bytes.
        processor_ms_per_sample: of all processes.
        peak_mb: largest memory of all processes, in 10^6 bytes, beyond what they had before the first batch was asked for.
        allowed_mb: (prefetch + 1) batches as they are stored, in 10^6 bytes.
        growth_mb: memory at the end beyond that after a quarter of the batches.
        start_seconds: from asking for the first batch to having it.
        seconds: of the timed batches.
    """

    case: Case
    samples_per_second: float
    read_mb_per_second: float
    processor_ms_per_sample: float
    peak_mb: float
    allowed_mb: float
    growth_mb: float
    start_seconds: float
    seconds: float


def measure(case: Case) -> Outcome:
    """Run one case."""
    device = torch.device(case.device)
    if device.type == "cuda":
        torch.zeros(1, device=device)
    torch.set_num_threads(case.workers)
    store = open_store(case.data)
    statistics = Statistics.load(case.statistics)
    order: Any = case.order
    samples = Samples(store, Window(INPUTS, (LEAD,)), None, None, TARGETS, statistics, order=Order(order, case.batch))
    needed = WARM_UP + case.batches
    epochs = -(-needed // (len(samples) // case.batch))  # each leaves out what does not fill a batch
    parts = [samples.epoch_items(0, epoch) for epoch in range(epochs)]
    items = np.concatenate([part[: len(part) // case.batch * case.batch] for part in parts])
    items = items[: needed * case.batch].reshape(-1, case.batch)
    _prepare_cache(samples.table, items, case.cache)
    keep_freed_memory()  # as a training does; not before, or what that has freed would serve the reader and not be counted
    stored = sum(_bytes_read(samples.table, part) for part in items[WARM_UP:])
    with contextlib.ExitStack() as held:
        watch = held.enter_context(MemoryWatch())
        asked = time.perf_counter()
        batches = _batches(case, samples, items, device, held)
        next(batches)
        start = time.perf_counter() - asked
        for _ in range(WARM_UP - 1):
            next(batches)
        _wait(device)
        early = watch.look()  # the watch looks too seldom for a short measurement; looking would cost time within it
        processor, began = processor_seconds(), time.perf_counter()
        for number in range(case.batches):
            next(batches)
            if number == case.batches // 4:
                early = watch.peak
        _wait(device)
        seconds = time.perf_counter() - began
        processor = processor_seconds() - processor
        late = watch.look()
    number = case.batches * case.batch
    largest = max(_bytes_read(samples.table, part) for part in items)
    return Outcome(
        case,
        number / seconds,
        stored / seconds / 1e6,
        1e3 * processor / number,
        (watch.peak - watch.start) / 1e6,
        (case.prefetch + 1) * largest / 1e6,
        (late - early) / 1e6,
        start,
        seconds,
    )


def _batches(
    case: Case, samples: Samples, items: np.ndarray, device: torch.device, held: contextlib.ExitStack
) -> Iterator[Any]:
    """Batches of the case, one after the other."""
    if case.reader == "raw":
        return _raw_reads(samples.table, items, case.workers)
    if case.reader in RIVALS:
        assert samples.statistics is not None
        mean, std = samples.statistics.select(samples.store.channels)
        places = samples.store.channel_indices(TARGETS)
        (path,) = sorted(samples.store.folder.glob("*.h5"))
        dataset = RIVALS[case.reader](path, samples.input_rows, samples.target_rows, places, mean, std)
        return rival_batches(dataset, items.reshape(-1), case.batch, case.workers, device)
    front: Any = case.reader
    options: Any = {"workers": case.workers, "prefetch": case.prefetch, "verify": case.verify}
    loader = held.enter_context(Loader(samples, front=front, device=device, **options))
    batches = held.enter_context(contextlib.closing(loader.of(items) if case.decoded else loader.raw(items)))
    return batches


def _pieces(table: FrameTable, items: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(row, places of the channels) that a batch needs, each row once."""
    need = table.need(items)
    for rows, channels in ((need.rows, table.input_channels), (need.target_rows, table.target_channels)):
        places = table.store.channel_indices(channels)
        for row in rows.tolist():
            yield row, places


def _bytes_read(table: FrameTable, items: np.ndarray) -> int:
    height, width = table.store.grid.shape
    field = height * width * table.store.encoding.stored_type.itemsize
    return sum(len(places) * field for _, places in _pieces(table, items))


def _raw_reads(table: FrameTable, items: np.ndarray, workers: int) -> Iterator[None]:
    """The same bytes of the same files in the same order, by bare reads of as many threads, two batches ahead, into three
    batches' memory in turn: the fastest that a reader of whole batches can be. Offsets are asked of HDF5, not of the store.
    """
    field = table.store.grid.shape[0] * table.store.grid.shape[1] * table.store.encoding.stored_type.itemsize
    offsets, descriptors = _offsets(table)
    ring = [np.ones(max(_bytes_read(table, part) for part in items), dtype=np.uint8) for _ in range(3)]
    ahead: deque[list[Future[None]]] = deque()

    def read(share: list[tuple[int, int, int, int]], memory: np.ndarray) -> None:
        for file, offset, position, size in share:
            os.preadv(descriptors[file], (memory[position : position + size],), offset)

    def wait_for(reads: list[Future[None]]) -> None:
        for one in reads:
            one.result()

    with ThreadPoolExecutor(workers) as pool:
        for number, part in enumerate(items):
            reads, position = [], 0
            for row, places in _pieces(table, part):
                file, offset = offsets[row]
                for place, count in _runs(places):
                    reads.append((file, offset + place * field, position, count * field))
                    position += count * field
            shares = [reads[worker::workers] for worker in range(workers)]
            ahead.append([pool.submit(read, share, ring[number % 3]) for share in shares])
            if len(ahead) == 3:  # the next batch takes the memory of the oldest
                wait_for(ahead.popleft())
                yield
        while ahead:
            wait_for(ahead.popleft())
            yield


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """(first, count) of neighbouring places."""
    cuts = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places)]
    return [(places[first], end - first) for first, end in pairwise(cuts)]


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


def _prepare_cache(table: FrameTable, items: np.ndarray, cache: str) -> None:
    """Let the page cache hold all that is read, or none of it."""
    if cache == "warm":
        for _ in _raw_reads(table, items, 1):
            pass
        return
    for path in table.store.folder.glob("*.h5"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

