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

PATIENCE = 3  # looks, a second apart, that find a worker gone and no batch: DALI itself notices most losses at once


class WorkerLost(RuntimeError):
    """A worker process has ended, and DALI waits for it."""


class Runner:
    """Runs a built pipeline on request.

    Args:
        pipeline: with parallel workers; nobody else may hold it.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self._pool = pipeline, pipeline._py_pool
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting = False  # for what was asked; also after a signal handler has raised out of the waiting
        self._thread = threading.Thread(target=_run, args=(pipeline, self._asked, self._made), name="smoe-dali", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._asked.put, False)  # where nobody closes it, the thread ends, and so the processes do

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

    def checkpoint(self) -> bytes:
        """DALI's own state."""
        state: bytes = self._pipeline.checkpoint()
        return state

    def _abandon(self) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self._pool.close = lambda: None  # it would wait for the lost worker too, at the latest when Python ends
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
        except BaseException as error:  # whoever asked raises it
            made.put(error)
