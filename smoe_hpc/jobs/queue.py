"""A whole run in the processes of this job: train, draw its pictures, and go back into the queue when signalled to stop."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from smoe_hpc.config import Recipe
from smoe_hpc.launch.job import job_id, requeue_if_running
from smoe_hpc.launch.stopping import handle_stop_signals, ignore_until_exit
from smoe_hpc.runs import Scores
from smoe_hpc.tasks import StoreTask
from smoe_hpc.training.processes import join
from smoe_hpc.training.run import train
from smoe_hpc.training.signals import RunInterrupted
from smoe_hpc.training.task import Draw


class Requeued(RunInterrupted):
    """A run that was signalled to stop and saved its state, and whose Slurm job waits in the queue to resume it."""


def train_or_requeue(recipe: Recipe, task: StoreTask, *, run_dir: str | Path, resume: bool = True) -> dict[str, Scores]:
    """Train as `train` does and draw the run's pictures; a Slurm job that is signalled to stop goes back into the queue.

    Collective over all processes.

    Raises:
        Requeued: the job was signalled to stop and is in the queue again.
        RunInterrupted: it was signalled to stop and is not in the queue; the message says why.
        SmoeError: what `train` raises.
    """
    with handle_stop_signals():
        try:
            return train(recipe, task, run_dir=run_dir, resume=resume, draw=drawing(task))
        except RunInterrupted as stopped:
            if job_id(os.environ) is None:
                raise
            # the others wait: a task that leaves earlier may end the step, and rank 0 with it
            requeue = join().on_first(lambda: requeue_if_running(os.environ))
            message = f"{stopped}; {requeue.why}"
            if requeue.done:
                ignore_until_exit()
                raise Requeued(message) from None
            raise RunInterrupted(message) from None


def drawing(task: StoreTask) -> Draw:
    """What draws the pictures of the task's run (see `smoe_hpc.report.draw_pictures`)."""

    def draw(run_dir: Path, model: nn.Module) -> None:
        from smoe_hpc.report import draw_pictures  # takes matplotlib: only where a run wants pictures

        draw_pictures(task, run_dir, model)

    return draw
