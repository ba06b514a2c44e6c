"""Scores of a run that is there, over a split of its data."""

from __future__ import annotations

from pathlib import Path

from smoe_hpc.errors import CheckpointError
from smoe_hpc.training.batches import require_finite
from smoe_hpc.training.checkpoint import Checkpoints
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.failures import shared_failures
from smoe_hpc.training.processes import join
from smoe_hpc.training.run_directory import RunDirectory
from smoe_hpc.training.scoring import score
from smoe_hpc.training.state import load_model, refuse_other_data
from smoe_hpc.training.task import Scores, Task


def evaluate(run_dir: str | Path, split: str, *, task: Task) -> Scores:
    """Scores of a run's best checkpoint (of its newest, while it trains) over a split. Collective over all processes.

    Args:
        run_dir: the run's folder; only read.
        split: "train", "validation" or "test".
        task: the task of the run's recipe (`RunDirectory.recipe`).

    Returns:
        {region: {score: value}}.

    Raises:
        RunError: the folder is not a run, or is of other data; a score is not finite; another rank failed.
        CheckpointError: it has no checkpoint, or one of another model.
    """
    processes = join()
    run = RunDirectory(Path(run_dir))
    recipe = processes.on_first(run.recipe)
    checkpoints = Checkpoints(run.checkpoints, processes, recipe.run.keep)
    best = processes.on_first(run.best_step)
    saved = checkpoints.newest() if best is None else checkpoints.at(best)
    if saved is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet; train it first")
    if best is None:  # still training: the best so far, if it is not the newest
        best = saved.state["position"]["plateau"]["best_step"]
        saved = saved if best is None else checkpoints.at(best)
    of_run = saved
    processes.together(lambda: refuse_other_data(task, run.path, of_run.identity))
    with shared_failures(processes):
        engine = Engine(task.build_model(), recipe, processes)
        load_model(engine, saved, task)
        scores = score(engine, task, split, recipe, processes)
        require_finite(scores, task.samples(split), split)
    return scores
