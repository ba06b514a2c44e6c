"""Data verbs as jobs: their processes share the work, and stop together when one of them gets a signal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer

from smoe_hpc.cli.output import progress
from smoe_hpc.errors import DataError
from smoe_hpc.launch.stopping import handle_stop_signals, ignore_until_exit, stop_requested

if TYPE_CHECKING:
    from smoe_hpc.launch.communicator import ProcessCommunicator

_ASKED = "stopped as asked"

Progress = Callable[[int, int], None]


class DataStopped(DataError):
    """A data job that was stopped by a signal: finished files are kept, and the same command does the rest.

    Attributes:
        exit_status: that of a stopped run.
    """

    exit_status = 75


@contextmanager
def data_job(what: str) -> Iterator[tuple[ProcessCommunicator, Progress]]:
    """The communicator of a data verb, and a progress to call with (done, total) on each of its ranks.

    Signals take effect in the progress: it raises a DataError, which the work hands to all ranks as it does any other. A job
    of Slurm is then requeued if that is right. Rank 0 alone prints errors.

    Args:
        what: label of the bar.

    Raises:
        DataStopped: a rank got a signal; on all ranks.
        DataError: what the work raises, on rank 0; the others exit with status 2.
        LaunchError: the processes do not belong together.
    """
    with handle_stop_signals():
        from smoe_hpc.launch.communicator import find_communicator

        with find_communicator() as communicator:
            try:
                with progress(what) if communicator.rank == 0 else nullcontext() as report:
                    yield communicator, _stopping(report)
                late = next(filter(None, communicator.gather(stop_requested())), "")  # came after the last progress
                if late:
                    raise DataError(f"{_ASKED} ({late})")
            except DataError as error:
                if str(error).startswith(_ASKED):  # some work hands on the message alone
                    raise _stopped(what, str(error), communicator) from None
                if communicator.rank:  # every rank has the same error, and one tells it
                    raise typer.Exit(2) from None
                raise


def _stopping(report: Progress | None) -> Progress:
    """A progress that raises once this process got a signal to stop."""

    def tell(done: int, total: int) -> None:
        if report is not None:
            report(done, total)
        if stop_requested():
            raise DataError(f"{_ASKED} ({stop_requested()})")

    return tell


def _stopped(what: str, why: str, communicator: ProcessCommunicator) -> DataStopped:
    """The error that ends a stopped job, which is requeued before if that is right (collective)."""
    from smoe_hpc.launch.job import job_id, requeue_if_running

    message = f"{what}: {why}; what is whole is kept, and the same command does the rest"
    if job_id(os.environ) is None:
        return DataStopped(message)
    # the others wait: a task that leaves earlier may end the step, and rank 0 with it
    requeue = communicator.gather(requeue_if_running(os.environ) if communicator.rank == 0 else None)[0]
    assert requeue is not None
    if requeue.done:
        ignore_until_exit()
    return DataStopped(f"{message}; {requeue.why}")
