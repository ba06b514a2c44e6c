"""Running DALI's pipeline so that the loss of a worker process ends in an error and not in waiting for ever.

DALI's workers wait at conditions shared between processes. If one is killed there (for want of memory, say), whoever next
wakes it waits for its answer in vain, in C, where no time-out reaches. So the pipeline runs in a thread, and who wants a
batch waits for that thread with an eye on the workers. A thread that is stuck is left behind, and the other workers are
ended; the pipeline's own way to close would get stuck in the same way.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from contextlib import suppress
from typing import Any

from smoe_hpc import compat

PATIENCE = 3  # looks, a second apart, that find a worker gone and no batch: DALI itself notices most losses at once


class WorkerLost(RuntimeError):
    """A worker process has ended, and DALI waits for it."""


class Runner:
    """Runs a built pipeline on request.

    Args:
        pipeline: with parallel workers; no other reference to it may be kept.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self._pool = pipeline, compat.dali_pool(pipeline)
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting = False  # for a request; also after a signal handler has raised out of the waiting
        self._thread = threading.Thread(target=_run, args=(pipeline, self._asked, self._made), name="smoe-dali", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._asked.put, False)  # without close() the thread still ends, and with it the processes

    @property
    def workers(self) -> list[int]:
        """Ids of the worker processes."""
        return list(self._pool.pids())

    def next(self) -> Any:
        """The pipeline's next outputs.

        Raises:
            Exception: whatever DALI raises.
            WorkerLost: a worker has ended without DALI saying so.
        """
        if not self._waiting:
            self._asked.put(True)
            self._waiting = True
        looks = 0
        while looks < PATIENCE:
            try:
                made = self._made.get(timeout=1.0)
            except queue.Empty:
                children = {child.pid for child in multiprocessing.active_children()}
                looks = 0 if set(self.workers) <= children else looks + 1
                continue
            self._waiting = False
            if isinstance(made, BaseException):
                raise made
            return made
        self._abandon()
        raise WorkerLost("a worker process has ended")

    def _abandon(self) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        compat.never_close_dali_pool(self._pool)
        self._pipeline = None

    def close(self) -> None:
        """End the thread and the processes."""
        if self._pipeline is None:
            return
        self._asked.put(False)
        self._thread.join()
        self._pipeline = self._pool = None
        gc.collect()  # DALI ends its processes when the pipeline is collected


def _run(pipeline: Any, asked: queue.SimpleQueue[bool], made: queue.SimpleQueue[Any]) -> None:
    while asked.get():
        try:
            made.put(pipeline.run())
        except BaseException as error:  # raised by the caller of `next`
            made.put(error)
