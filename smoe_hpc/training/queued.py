"""Training as a job of a queue: what was asked to stop saves, goes back into the queue, and goes on at its next start."""

from __future__ import annotations

import os
from pathlib import Path

from smoe_hpc.config import Recipe
from smoe_hpc.launch.job import job_id, requeue_if_running
from smoe_hpc.launch.stopping import ignore_until_exit, listening
from smoe_hpc.training.processes import join
from smoe_hpc.training.run import train
from smoe_hpc.training.signals import RunInterrupted
from smoe_hpc.training.task import Scores, Task


class Requeued(RunInterrupted):
    """A run that was asked to stop, saved its state, and whose Slurm job waits in the queue to go on."""


def train_or_requeue(recipe: Recipe, task: Task, *, run_dir: str | Path, resume: bool = True) -> dict[str, Scores]:
    """What `train` does; a Slurm job that was asked to stop is put back into the queue (collective over all processes).

    Raises:
        Requeued: the job was asked to stop and is in the queue again.
        RunInterrupted: it was asked to stop and is not; the message says why.
        SmoeError: what `train` raises.
    """
    with listening():
        try:
            return train(recipe, task, run_dir=run_dir, resume=resume)
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
