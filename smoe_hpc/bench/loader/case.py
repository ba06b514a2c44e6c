"""One measurement of `smoe-hpc bench loader`, made in a process of its own.

A process of its own, so that memory and processor time are of this case alone, and no case profits from another's. What
is measured: how fast one rank gets its batches, from the first batch on (starting the workers is measured apart).

Dimensions: S samples, B batch, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smoe_hpc.bench.loader.baselines import BASELINES, baseline_batches
from smoe_hpc.bench.loader.raw_reads import bytes_read, raw_reads
from smoe_hpc.bench.processes import MemoryWatch, processor_seconds
from smoe_hpc.io.loading.frames import FrameTable
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.order import Order
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.training.memory import keep_freed_memory

INPUTS, LEAD, TARGETS = (-12, -6, 0), 72, ("z500", "t850", "t2m")
WARM_UP = 3  # batches before the clock starts


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        reader: "raw" (bare reads of the same bytes), "threads" or "dali" (our backends), or a name of `BASELINES`.
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
    parts = [samples.epoch_ids(0, epoch) for epoch in range(epochs)]
    ids = np.concatenate([part[: len(part) // case.batch * case.batch] for part in parts])
    ids = ids[: needed * case.batch].reshape(-1, case.batch)
    _prepare_cache(samples.table, ids, case.cache)
    keep_freed_memory()  # as a training does; not before, or what that has freed would serve the reader and not be counted
    stored = sum(bytes_read(samples.table, part) for part in ids[WARM_UP:])
    with contextlib.ExitStack() as held:
        watch = held.enter_context(MemoryWatch())
        asked = time.perf_counter()
        batches = batches_of(case, samples, ids, device, held)
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
    largest = max(bytes_read(samples.table, part) for part in ids)
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


def batches_of(
    case: Case, samples: Samples, ids: np.ndarray, device: torch.device, held: contextlib.ExitStack
) -> Iterator[Any]:
    """Batches of the case, one after the other."""
    if case.reader == "raw":
        return raw_reads(samples.table, ids, case.workers)
    if case.reader in BASELINES:
        assert samples.statistics is not None
        mean, std = samples.statistics.select(samples.store.channels)
        indices = samples.store.channel_indices(TARGETS)
        (path,) = sorted(samples.store.folder.glob("*.h5"))
        dataset = BASELINES[case.reader](path, samples.input_rows, samples.target_rows, indices, mean, std)
        return baseline_batches(dataset, ids.reshape(-1), case.batch, case.workers, device)
    backend: Any = case.reader
    options: Any = {"workers": case.workers, "prefetch": case.prefetch, "verify": case.verify}
    loader = held.enter_context(Loader(samples, backend=backend, device=device, **options))
    batches = held.enter_context(contextlib.closing(loader.of(ids) if case.decoded else loader.stored(ids)))
    return batches


def _prepare_cache(table: FrameTable, ids: np.ndarray, cache: str) -> None:
    """Let the page cache hold all that is read, or none of it."""
    if cache == "warm":
        for _ in raw_reads(table, ids, 1):
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
