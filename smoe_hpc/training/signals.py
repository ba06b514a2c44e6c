"""Stopping on request: a signal sets a flag, all ranks agree on a step, save there, and leave with their own status.

A scheduler sends SIGTERM or SIGUSR1 to some or all ranks, not at the same moment. So a signal handler only notes it;
once a step the ranks combine their notes (bitwise, by an all-reduce of one number on the control group). The answer
of one step is read at the next: by then it has long arrived, and nobody waits for it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from smoe_hpc.errors import RunError
from smoe_hpc.training.processes import Processes

STOP = 0  # a rank was asked to stop
SAVE = 1  # rank 0's clock says that a checkpoint is due
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RunInterrupted(RunError):
    """A run that was asked to stop, saved its state and can be resumed by the same command.

    Attributes:
        exit_status: what the process should exit with (EX_TEMPFAIL of sysexits.h): neither success nor an error.
    """

    exit_status = 75


class Requests:
    """Requests that reach one rank, made known to all. Use as a context manager around the training loop."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._local = [0, 0]
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[int, Any] = {}
        self.name = ""

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and (exception[0] is None or isinstance(exception[1], RunInterrupted)):
            self._pending[0].wait()  # every rank has sent its part: leave none in flight
        self._pending = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._local[STOP] = 1

    def poll(self, save: bool = False) -> tuple[bool, bool]:
        """Whether to stop and whether to save, the same on every rank (collective, once a step).

        Args:
            save: on rank 0, whether its clock asks for a checkpoint; ignored elsewhere.
        """
        self._local[SAVE] = int(save)
        if self._processes.world == 1:
            return bool(self._local[STOP]), save
        answer = [0, 0]
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            answer = flags.tolist()
        flags = torch.tensor(self._local, dtype=torch.int32)
        self._pending = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._processes.control, async_op=True), flags
        return bool(answer[STOP]), bool(answer[SAVE])
