"""Reading in processes of NVIDIA DALI: what threads cannot share (HDF5's lock, decompression) is spread over them.

The pipeline has one source, which runs in parallel in worker processes and gives fields as they are stored; decoding is
left to the decoder that all ways of reading share. DALI's own batch is one sample here, whose first dimension says how many
fields were read: every batch may need another number of them. On a machine without GPU the pipeline runs with
``device_id=None``; otherwise DALI sends the fields to the GPU and torch takes them where they lie.

One pipeline serves all epochs of a loader (`Schedule`), because starting it takes seconds. DALI asks ahead: between two
epochs some requests find nothing to do and come back idle, and are passed over.
"""

from __future__ import annotations

import collections
import importlib.util
import multiprocessing.resource_tracker
import shutil
import signal
import tempfile
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io.decoding import Raw
from smoe_hpc.io.fields import check_verify
from smoe_hpc.io.fronts.dali_runner import Runner
from smoe_hpc.io.fronts.dali_worker import BROKEN, IDLE, PREFIX, QUIET_SIGNALS, REFUSED, Schedule, Source, as_text
from smoe_hpc.io.reading import FrameTable

REMEDY = "pip install nvidia-dali-cuda130 (extra dali of smoe-hpc), or set loader.front=plain"


def installed() -> bool:
    """Whether DALI can be imported (it is not: that takes half a second)."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia at all
        return False


@dataclass(frozen=True)
class Checkpoint:
    """Where a pipeline stands.

    Args:
        first: DALI's number of the first batch that was being delivered.
        delivered: batches it has given.
        state: DALI's own.
    """

    first: int
    delivered: int
    state: bytes


class DaliFront:
    """Raw batches read by DALI; see the top of this file.

    Args:
        table: what to read.
        workers: processes that read, each a batch at a time.
        prefetch: batches read ahead.
        verify: as `Reader` has it.
        device: where batches are decoded.
        checkpoint: what `checkpoint` gave: the pipeline goes on behind the batch that was delivered last then, if it is
            asked for the same batches.

    Raises:
        DataError: DALI is not installed.
    """

    name = "dali"

    def __init__(
        self,
        table: FrameTable,
        *,
        workers: int,
        prefetch: int,
        verify: str,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        if not installed():
            raise DataError(f"loader.front=dali needs NVIDIA DALI, which is not installed: {REMEDY}")
        self._table, self._device, self._workers = table, device, workers
        self._gpu = device.type == "cuda"
        self._ahead = max(prefetch, workers)  # asked of the workers
        self._queue = 2 if self._gpu else 1  # in the pipeline itself: on a GPU one copy goes on while another is used
        self._verify, self._restored = check_verify(verify), checkpoint
        folder = Path(tempfile.mkdtemp(prefix="smoe-dali-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._schedule = Schedule(folder)
        self._runner: Runner | None = None
        self._first = self._delivered = 0  # number of a schedule's first batch; batches that DALI has given, idle ones too
        self._held: collections.deque[tuple[Any, torch.cuda.Event]] = collections.deque()

    def deliver(self, batches: np.ndarray) -> Generator[Raw, None, None]:
        """Raw batches of items [batches, B], in order; each valid until the next is asked for.

        Raises:
            DataError: while iterating, what reading raises; a worker process that ended.
        """
        if self._restored is not None:
            first, self._delivered = self._restored.first, self._restored.delivered
        else:
            first = self._delivered + self._queue + self._ahead if self._delivered else 0
        number = self._schedule.announce(first, batches)
        runner = self._start() if self._runner is None else self._runner
        self._first, self._restored = first, None
        expected = max(self._delivered - first, 0)
        while expected < len(batches):
            outputs = self._run(runner)
            header = np.array(outputs[0][0])
            if header[0] == IDLE or header[1] != number:
                continue
            if header[0] == REFUSED:
                raise DataError(as_text(header[PREFIX:]))
            if header[0] == BROKEN:
                raise RuntimeError(f"a worker of DALI failed:\n{as_text(header[PREFIX:])}")
            assert header[2] == expected, f"batch {header[2]} came in place of {expected}"
            yield self._raw(header[PREFIX:], *outputs[1:])
            expected += 1

    def _raw(self, plan: np.ndarray, frames: Any, targets: Any) -> Raw:
        header = torch.from_numpy(plan)
        stored, stored_targets = torch.from_dlpack(frames[0]), torch.from_dlpack(targets[0])
        return Raw(stored, stored_targets, header.to(self._device) if self._gpu else header, plan)

    def _run(self, runner: Runner) -> Any:
        """The next outputs of the pipeline: header, fields and targets, each a list of one."""
        if self._gpu:
            self._release()
        try:
            outputs = runner.next()
        except Exception as error:  # DALI raises whatever it meets; the pipeline is of no use any more
            self._stop()
            raise DataError(
                f"DALI stopped ({str(error).strip().splitlines()[-1]}): a worker process may have been killed, for want of "
                "memory say; lower loader.workers or loader.prefetch, or set loader.front=plain"
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
            batch_size=1,
            num_threads=1,
            device_id=(self._device.index or 0) if self._gpu else None,
            prefetch_queue_depth=self._queue,
            py_num_workers=self._workers,
            py_start_method="spawn",  # HDF5's handles and CUDA's do not outlive a fork
            enable_checkpointing=True,
            checkpoint=None if self._restored is None else self._restored.state,
        )
        with pipeline:
            header, frames, targets = fn.external_source(
                source=Source(self._table, self._verify, self._schedule),
                num_outputs=3,
                batch=True,
                batch_info=True,
                parallel=True,
                prefetch_queue_depth=self._ahead,
                dtype=[Type.INT64, stored, stored],
                ndim=[1, 4, 4],
            )
            if self._gpu:
                frames, targets = frames.gpu(), targets.gpu()
            pipeline.set_outputs(header, frames, targets)
        with _quiet_children():
            pipeline.build()
        self._runner = Runner(pipeline)
        return self._runner

    def checkpoint(self) -> Checkpoint:
        """Where the pipeline stands: another front that is made with this goes on behind the batch delivered last."""
        assert self._runner is not None, "nothing has been delivered"
        return Checkpoint(self._first, self._delivered, self._runner.checkpoint())

    def _stop(self) -> None:
        if self._gpu and self._held:
            self._held[-1][1].record(torch.cuda.current_stream(self._device))
            self._held[-1][1].synchronize()
            self._held.clear()
        runner, self._runner, self._delivered = self._runner, None, 0
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
