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
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.io.decoding import Raw
from smoe_hpc.io.fronts.pinned import pinned
from smoe_hpc.io.reading import HEADER, FrameTable, Reader

THREAD_NAME = "smoe-prefetch"


class PlainFront:
    """Raw batches read in threads; see the top of this file.

    Args:
        table: what to read.
        workers: threads that share the rows of a batch.
        prefetch: batches read ahead.
        verify: as `Reader` has it.
        device: where batches are decoded.
    """

    name = "plain"

    def __init__(self, table: FrameTable, *, workers: int, prefetch: int, verify: str, device: torch.device) -> None:
        self._table, self._slots, self._device = table, prefetch + 1, device
        self._reader = Reader(table, workers, verify)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: tuple[int, list[_Slot]] | None = None  # the ring of the iterator before, for batches of that size

    def deliver(self, batches: np.ndarray) -> Generator[Raw, None, None]:
        """Raw batches of items [batches, B], in order; each valid until the next is asked for.

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
                for items in batches:
                    slot = free.get()
                    if stop.is_set():
                        return
                    slot.fill(items, self._reader)
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
                    yield got.raw()
                finally:
                    got.used()
                free.put(got)
        finally:
            stop.set()
            free.put(ring[0])  # wakes a thread that waits for room; it stops before it takes any
            thread.join()
            self._spare = (size, ring)

    def _ring(self, size: int) -> list[_Slot]:
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] == size:
            return spare[1]
        return [_Slot(self._table, size, self._device, self._stream) for _ in range(self._slots)]

    def close(self) -> None:
        """End the helping threads and give the buffers back."""
        self._reader.close()
        self._spare = None


class _Slot:
    """Memory of one batch: of the host, and on a GPU its twin there."""

    def __init__(
        self, table: FrameTable, size: int, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self._table, self._device, self._stream = table, device, stream
        stored = torch.from_numpy(np.empty(0, table.store.encoding.stored_type)).dtype
        inputs, targets = size * table.inputs_each, size * table.targets_each
        shapes = (
            ((inputs, len(table.input_channels), *table.store.grid.shape), stored),
            ((targets, len(table.target_channels), *table.store.grid.shape), stored),
            ((HEADER + 2 * size + inputs + targets,), torch.int64),
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
        self._counts = (0, 0)

    def fill(self, items: np.ndarray, reader: Reader) -> None:
        """Read a batch, and send it to the device (by the reading thread)."""
        need = self._table.need(items)
        frames, targets, header = self._arrays
        if self._stream is not None:
            self._copied.synchronize()  # of the batch that was here before; long done
        self._counts = (len(need.rows), len(need.target_rows))
        header[:] = need.header
        reader.read(need, frames[: self._counts[0]], targets[: self._counts[1]])
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._decoded)
                for host, twin in zip(self._cut(self._host), self._cut(self._twin), strict=True):
                    twin.copy_(host, non_blocking=True)
                self._copied.record(self._stream)

    def raw(self) -> Raw:
        """The batch, for the current stream (by the consumer)."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        frames, targets, header = self._cut(self._twin)
        return Raw(frames, targets, header, self._arrays[2])

    def used(self) -> None:
        """What the consumer has done with the batch is all on its current stream by now."""
        if self._stream is not None:
            self._decoded.record(torch.cuda.current_stream(self._device))

    def _cut(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return parts[0][: self._counts[0]], parts[1][: self._counts[1]], parts[2]
