"""Stopping on request: a signal is noted, all ranks agree on a step, save there, and leave with their own status.

A scheduler sends SIGTERM, SIGUSR1 or SIGUSR2 to some or all ranks, not at the same moment. So a signal handler only notes
it (`smoe_hpc.launch.stopping`, from the start of the command); once a step the ranks combine their notes (bitwise, by an
all-reduce of one number on the control group). The answer of one step is read at the next: by then it has long arrived,
and nobody waits for it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist

from smoe_hpc.errors import RunError
from smoe_hpc.launch.stopping import handle_stop_signals, restore_sigterm, stop_requested
from smoe_hpc.training.processes import Processes

STOP = 0  # a rank was signalled to stop
SAVE = 1  # by rank 0's clock a checkpoint is due


class RunInterrupted(RunError):
    """A run that was signalled to stop and saved its state; the same command resumes it.

    Attributes:
        exit_status: what the process should exit with (EX_TEMPFAIL of sysexits.h): neither success nor an error. torchrun
            turns it into 1, as every status.
    """

    exit_status = 75


class Requests:
    """Requests to stop or save, combined over all ranks. Use as a context manager around the training loop."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._local = [0, 0]
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._held = contextlib.ExitStack()

    @property
    def name(self) -> str:
        """The signal that requested a stop on this rank, or "" if it reached only others."""
        return stop_requested()

    def __enter__(self) -> Requests:
        self._held.enter_context(handle_stop_signals())
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()
        if exception[0] is None:
            restore_sigterm()  # training has ended and is saved; scoring it can be repeated
        if self._pending is not None and (exception[0] is None or isinstance(exception[1], RunInterrupted)):
            self._pending[0].wait()  # every rank has sent its part: leave none in flight
        self._pending = None

    def poll(self, save: bool = False) -> tuple[bool, bool]:
        """Whether to stop and whether to save, the same on every rank (collective, once a step).

        Args:
            save: on rank 0, whether a checkpoint is due by its clock; ignored elsewhere.
        """
        self._local = [int(bool(stop_requested())), int(save)]
        if self._processes.world == 1:
            return bool(self._local[STOP]), save
        answer = [0, 0]
        if self._pending is not None:
            work, flags = self._pending
            with self._processes.at("all_reduce (requests to stop)"):
                work.wait()
            answer = flags.tolist()
        flags = torch.tensor(self._local, dtype=torch.int32)
        self._pending = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._processes.control, async_op=True), flags
        return bool(answer[STOP]), bool(answer[SAVE])
