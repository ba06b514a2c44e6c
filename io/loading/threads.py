"""Reading in threads: one goes ahead of the consumer through a ring of buffers, others help it with each batch.

The ring has one buffer more than batches are read ahead; the one that is being decoded is not written until the consumer
asks for the next. On a GPU each buffer is pinned memory and a twin on the device: the reading thread sends what it has
read over a stream of its own, and two events keep the order. ``copied`` tells the consumer's stream that the twin is whole,
and the reading thread that the pinned memory may be filled again; ``decoded`` tells the copying stream that the twin has
been used. No memory is taken for a batch, but for what is decoded.

Dimensions: B batch, I input fields, D leads of a sample, C and Ct channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.io.loading.batch_plan import BatchPlan
from smoe_hpc.io.loading.decoding import StoredBatch
from smoe_hpc.io.loading.frames import FrameTable, read_frames
from smoe_hpc.io.loading.pinned import pinned
from smoe_hpc.io.store.interface import check_verify

THREAD_NAME = "smoe-prefetch"


class ThreadBackend:
    """Batches read in threads; see the top of this file.

    Args:
        table: what to read.
        workers: threads that share the rows of a batch.
        prefetch: batches read ahead.
        verify: as `read_frames` has it.
        device: where batches are decoded.
    """

    name = "threads"

    def __init__(self, table: FrameTable, *, workers: int, prefetch: int, verify: str, device: torch.device) -> None:
        self._table, self._slots, self._device = table, prefetch + 1, device
        self._verify, self._workers = check_verify(verify), workers
        self._helpers = ThreadPoolExecutor(workers - 1, thread_name_prefix="smoe-read") if workers > 1 else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: tuple[int, list[_Slot]] | None = None  # the ring of the iterator before, for batches of that size

    def deliver(self, batches: np.ndarray) -> Generator[StoredBatch, None, None]:
        """Batches of ids [batches, B] as they are stored, in order; each valid until the next is asked for.

        Raises:
            DataError: while iterating, what reading raises.
        """
        size = batches.shape[1]
        ring = self._ring(size)
        free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        filled: queue.SimpleQueue[_Slot | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        for slot in ring:
            free.put(slot)

        def work() -> None:
            try:
                for ids in batches:
                    slot = free.get()
                    if stop.is_set():
                        return
                    slot.fill(self._table.plan(ids), self._read)
                    filled.put(slot)
                filled.put(None)
            except BaseException as error:  # the consumer raises it
                filled.put(error)

        thread = threading.Thread(target=work, name=THREAD_NAME, daemon=True)
        thread.start()
        try:
            while (got := filled.get()) is not None:
                if isinstance(got, BaseException):
                    raise got
                try:
                    yield got.stored()
                finally:
                    got.used()
                free.put(got)
        finally:
            stop.set()
            free.put(ring[0])  # wakes a thread that waits for room; it stops before it takes any
            thread.join()
            self._spare = (size, ring)

    def _read(self, plan: BatchPlan, frames: np.ndarray, target_frames: np.ndarray) -> None:
        rows = plan.rows, plan.target_rows
        read_frames(self._table, rows, (frames, target_frames), self._verify, self._helpers, self._workers)

    def _ring(self, size: int) -> list[_Slot]:
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] == size:
            return spare[1]
        return [_Slot(self._table, size, self._device, self._stream) for _ in range(self._slots)]

    @property
    def processes(self) -> list[int]:
        """None: threads read."""
        return []

    def close(self) -> None:
        """End the helping threads and give the buffers back."""
        if self._helpers is not None:
            self._helpers.shutdown(wait=True)
        self._spare = None


class _Slot:
    """Memory of one batch: of the host, and on a GPU its twin there."""

    def __init__(self, table: FrameTable, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = device, stream
        stored = torch.from_numpy(np.empty(0, table.store.encoding.stored_type)).dtype
        inputs, targets = size * table.inputs_each, size * table.targets_each
        shapes = (
            ((inputs, len(table.input_channels), *table.store.grid.shape), stored),
            ((targets, len(table.target_channels), *table.store.grid.shape), stored),
            ((BatchPlan.most_numbers(size, table.inputs_each, table.targets_each),), torch.int64),
        )
        take = torch.empty if stream is None else pinned
        self._host = [take(shape, dtype=dtype) for shape, dtype in shapes]
        self._arrays = [tensor.numpy() for tensor in self._host]
        self._twin = self._host
        if stream is not None:
            self._twin = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
            for twin in self._twin:
                twin.record_stream(stream)  # given back, it waits for a copy that is still under way
            self._copied, self._decoded = torch.cuda.Event(), torch.cuda.Event()
            self._decoded.record(torch.cuda.current_stream(device))  # the twin is new memory of that stream
        self._plan: BatchPlan | None = None

    def fill(self, plan: BatchPlan, read: Callable[[BatchPlan, np.ndarray, np.ndarray], None]) -> None:
        """Read a batch, and send it to the device (by the reading thread)."""
        frames, targets, packed = self._arrays
        if self._stream is not None:
            self._copied.synchronize()  # of the batch that was here before; long done
        self._plan = plan
        numbers = plan.pack()
        packed[: len(numbers)] = numbers
        read(plan, frames[: len(plan.rows)], targets[: len(plan.target_rows)])
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._decoded)
                for host, twin in zip(self._cut(self._host), self._cut(self._twin), strict=True):
                    twin.copy_(host, non_blocking=True)
                self._copied.record(self._stream)

    def stored(self) -> StoredBatch:
        """The batch, for the current stream (by the consumer)."""
        assert self._plan is not None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        frames, targets, packed = self._cut(self._twin)
        return StoredBatch(self._plan, packed, frames, targets)

    def used(self) -> None:
        """What the consumer has done with the batch is all on its current stream by now."""
        if self._stream is not None:
            self._decoded.record(torch.cuda.current_stream(self._device))

    def _cut(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the batch fills of fields, targets and plan."""
        assert self._plan is not None
        return parts[0][: len(self._plan.rows)], parts[1][: len(self._plan.target_rows)], parts[2]
