"""Data verbs as jobs: processes that share the work, and that stop together when one of them is asked to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer

from smoe_hpc.cli.output import progress
from smoe_hpc.errors import DataError
from smoe_hpc.launch.stopping import asked, ignore_until_exit, listening

if TYPE_CHECKING:
    from smoe_hpc.launch.team import ProcessTeam

_ASKED = "stopped as asked"

Progress = Callable[[int, int], None]


class DataStopped(DataError):
    """A data job that was asked to stop: what is whole is kept, and the same command does the rest.

    Attributes:
        exit_status: as of a run that was asked to stop.
    """

    exit_status = 75


@contextmanager
def data_job(what: str) -> Iterator[tuple[ProcessTeam, Progress]]:
    """The team of a data verb, and a progress to call with (done, total) on each of its ranks.

    The progress is where a signal is obeyed: it ends the work with an error that the work hands to all ranks, as it does
    with any DataError. A job of Slurm then goes back into the queue where that is right. Rank 0 alone tells errors.

    Args:
        what: is being done, for the bar.

    Raises:
        DataStopped: a rank was asked to stop; on all ranks.
        DataError: what the work raises, on rank 0; the others exit with status 2.
        LaunchError: processes that do not fit together.
    """
    with listening():
        from smoe_hpc.launch.team import find_team

        with find_team() as team:
            try:
                with progress(what) if team.rank == 0 else nullcontext() as report:
                    yield team, _stopping(report)
                late = next(filter(None, team.gather(asked())), "")  # came where nobody looked
                if late:
                    raise DataError(f"{_ASKED} ({late})")
            except DataError as error:
                if str(error).startswith(_ASKED):  # some work hands on nothing but the words
                    raise _stopped(what, str(error), team) from None
                if team.rank:  # every rank has the same error, and one tells it
                    raise typer.Exit(2) from None
                raise


def _stopping(report: Progress | None) -> Progress:
    """A progress that raises where this process was asked to stop."""

    def tell(done: int, total: int) -> None:
        if report is not None:
            report(done, total)
        if asked():
            raise DataError(f"{_ASKED} ({asked()})")

    return tell


def _stopped(what: str, why: str, team: ProcessTeam) -> DataStopped:
    """The end of a job that was asked to stop, after it was requeued if that is right (collective)."""
    from smoe_hpc.launch.job import job_id, requeue_if_running

    message = f"{what}: {why}; what is whole is kept, and the same command does the rest"
    if job_id(os.environ) is None:
        return DataStopped(message)
    # the others wait: a task that leaves earlier may end the step, and rank 0 with it
    requeue = team.gather(requeue_if_running(os.environ) if team.rank == 0 else None)[0]
    assert requeue is not None
    if requeue.done:
        ignore_until_exit()
    return DataStopped(f"{message}; {requeue.why}")
