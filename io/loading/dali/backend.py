"""Reading in processes of NVIDIA DALI: what threads cannot share (HDF5's lock, decompression) is spread over them.

The pipeline has one source, which runs in parallel in worker processes and gives fields as they are stored; decoding is
left to the decoder that all ways of reading share. Each batch is cut into as many pieces as there are workers, and these
are what DALI calls the samples of its batch: so all workers read the same batch, and none holds more than pieces. The pieces
of a batch are alike in shape, DALI lays them end to end, and torch takes them as one tensor where they lie. On a machine
without GPU the pipeline runs with ``device_id=None``; otherwise DALI sends the fields to the GPU.

Of stored fields the host then holds ``prefetch`` batches and those in the pipeline (1, on a GPU 2) in memory shared with the
workers (:mod:`smoe_hpc.io.loading.dali.shared_memory`: fewer are read ahead where there is little of it), up to ``prefetch``
batches in the workers' own, and what DALI lays end to end: 1 batch, or on a GPU those under way.

One pipeline serves all epochs of a loader (`Schedule`), because starting it takes seconds. DALI asks ahead: between two
epochs some requests find nothing to do and come back idle, and are passed over.
"""

from __future__ import annotations

import collections
import importlib.util
import multiprocessing.resource_tracker
import signal
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io.loading.batch_plan import BatchPlan
from smoe_hpc.io.loading.dali.runner import Runner
from smoe_hpc.io.loading.dali.scratch import make_folder
from smoe_hpc.io.loading.dali.shared_memory import FOLDER, Budget, Room
from smoe_hpc.io.loading.dali.worker import (
    BROKEN,
    IDLE,
    PREFIX,
    QUIET_SIGNALS,
    READ,
    REFUSED,
    Schedule,
    Source,
    as_text,
)
from smoe_hpc.io.loading.decoding import StoredBatch
from smoe_hpc.io.loading.frames import FrameTable
from smoe_hpc.io.store.interface import check_verify

REMEDY = "pip install nvidia-dali-cuda130 (extra dali of smoe-hpc), or set loader.backend=threads"


def installed() -> bool:
    """Whether DALI can be imported (it is not: that takes half a second)."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia at all
        return False


class DaliBackend:
    """Batches read by DALI; see the top of this file.

    Args:
        table: what to read.
        workers: processes that share the fields of a batch.
        prefetch: batches read ahead.
        verify: as `read_frames` has it.
        device: where batches are decoded.

    Raises:
        DataError: DALI is not installed.
    """

    name = "dali"

    def __init__(self, table: FrameTable, *, workers: int, prefetch: int, verify: str, device: torch.device) -> None:
        if not installed():
            raise DataError(f"loader.backend=dali needs NVIDIA DALI, which is not installed: {REMEDY}")
        self._table, self._device, self._workers = table, device, workers
        self._gpu = device.type == "cuda"
        self._ahead = prefetch  # asked of the workers
        self._queue = 2 if self._gpu else 1  # in the pipeline itself: on a GPU one copy goes on while another is used
        self._verify = check_verify(verify)
        folder, remove = make_folder("smoe-dali-")
        self._remove_folder = weakref.finalize(self, remove)
        self._schedule = Schedule(folder)
        self._runner: Runner | None = None
        self._budget = Budget(table, workers, prefetch, self._queue)
        self._delivered = 0  # batches that DALI has given, idle ones too
        self._held: collections.deque[tuple[Any, torch.cuda.Event]] = collections.deque()

    def deliver(self, batches: np.ndarray) -> Generator[StoredBatch, None, None]:
        """Batches of ids [batches, B] as they are stored, in order; each valid until the next is asked for.

        Raises:
            DataError: while iterating, what reading raises; too little shared memory; a worker process that ended.
        """
        lack = self.lacks(batches.shape[1])
        if lack is not None:
            raise DataError(f"loader.backend=dali: {lack}")
        self._ahead = self._budget.take(batches.shape[1])
        first = self._delivered + self._queue + self._ahead if self._delivered else 0
        number = self._schedule.announce(first, batches)
        runner = self._start() if self._runner is None else self._runner
        expected = 0
        while expected < len(batches):
            stored = self._stored(self._run(runner), number, expected)
            if stored is None:
                continue
            yield stored
            expected += 1
            if not self._gpu:  # on a GPU `_release` does it
                for fields in (stored.frames, stored.target_frames):
                    fields.set_(torch.empty(0, dtype=fields.dtype).untyped_storage())  # before the next batch takes memory

    def lacks(self, batch: int) -> str | None:
        """What is wrong where there is too little shared memory for batches of that many samples; None if there is enough."""
        return self._budget.lacks(batch)

    def _stored(self, outputs: Any, number: int, expected: int) -> StoredBatch | None:
        """What DALI gave as a batch, None where it was not for schedule ``number``.

        Raises:
            DataError: what reading raised.
        """
        answers = [np.array(outputs[0][piece]) for piece in range(self._workers)]
        if answers[0][0] == IDLE or answers[0][1] != number:
            return None
        for answer in answers:
            if answer[0] == REFUSED:
                raise DataError(as_text(answer[PREFIX:]))
            if answer[0] == BROKEN:
                raise RuntimeError(f"a worker of DALI failed:\n{as_text(answer[PREFIX:])}")
            assert answer[0] == READ, f"piece of batch {expected} was not read"
            assert answer[1:PREFIX].tolist() == [number, expected], f"batch {answer[2]} came in place of {expected}"
        numbers = answers[0][PREFIX:]
        plan, packed = BatchPlan.unpack(numbers), torch.from_numpy(numbers)
        frames = join_pieces(outputs[1], len(plan.rows))
        targets = join_pieces(outputs[2], len(plan.target_rows))
        return StoredBatch(plan, packed.to(self._device) if self._gpu else packed, frames, targets)

    def _run(self, runner: Runner) -> Any:
        """The next outputs of the pipeline: answers, fields and targets, each a list of pieces."""
        if self._gpu:
            self._release()
        try:
            outputs = runner.next()
        except Exception as error:  # DALI raises whatever it meets; the pipeline is of no use any more
            room = Room.of(FOLDER)
            self._stop()
            left = "" if room is None else f" ({FOLDER} had {room.free / 1e6:,.0f} MB left)"
            raise DataError(
                f"DALI stopped ({str(error).strip().splitlines()[-1]}): a worker process may have been killed, for want of "
                f"memory say{left}; lower loader.workers or loader.prefetch, or set loader.backend=threads"
            ) from error
        self._delivered += 1
        if self._gpu:
            self._held.append((outputs, torch.cuda.Event()))
        return outputs

    def _release(self) -> None:
        """Mark what the last outputs were used for, and let go of those whose use is over."""
        if self._held:
            self._held[-1][1].record(torch.cuda.current_stream(self._device))
        while len(self._held) > 1:  # the last but one was used before a whole step of training
            self._held[0][1].synchronize()
            self._held.popleft()

    def _start(self) -> Runner:
        from nvidia.dali import Pipeline, fn
        from nvidia.dali.types import DALIDataType as Type

        stored = {"float32": Type.FLOAT, "float16": Type.FLOAT16, "int16": Type.INT16}[self._table.store.encoding.dtype]
        pipeline = Pipeline(
            batch_size=self._workers,
            num_threads=self._workers,  # they lay the pieces end to end
            device_id=(self._device.index or 0) if self._gpu else None,
            prefetch_queue_depth=self._queue,
            py_num_workers=self._workers,
            py_start_method="spawn",  # HDF5's handles and CUDA's do not outlive a fork
        )
        with pipeline:
            answer, frames, targets = fn.external_source(
                source=Source(self._table, self._verify, self._schedule, self._workers, self._ahead),
                num_outputs=3,
                batch=False,
                parallel=True,
                prefetch_queue_depth=self._ahead,
                dtype=[Type.INT64, stored, stored],
                ndim=[1, 4, 4],
            )
            if self._gpu:
                frames, targets = frames.gpu(), targets.gpu()
            pipeline.set_outputs(answer, frames, targets)
        with _quiet_children():
            pipeline.build()
        self._runner = Runner(pipeline)
        return self._runner

    def _stop(self) -> None:
        if self._gpu and self._held:
            self._held[-1][1].record(torch.cuda.current_stream(self._device))
            self._held[-1][1].synchronize()
            self._held.clear()
        runner, self._runner, self._delivered = self._runner, None, 0
        self._budget.give_back()
        if runner is not None:
            runner.close()

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._remove_folder()

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that read; none before the first batch."""
        return [] if self._runner is None else self._runner.workers


def join_pieces(pieces: Any, count: int) -> torch.Tensor:
    """The first ``count`` fields [count, C, H, W] of DALI's pieces, each [n, C, H, W]; where they lie if that is end to end."""
    if pieces.is_dense_tensor():
        fields = torch.from_dlpack(pieces.as_tensor()).flatten(0, 1)
    else:
        fields = torch.cat([torch.from_dlpack(piece) for piece in pieces])
    return fields[:count].detach()  # torch's view of another tensor would hold that


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Processes started within are born with `QUIET_SIGNALS` blocked.

    Python's resource tracker, which the first of them would start, unblocks signals on its way: it is started before.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, QUIET_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
