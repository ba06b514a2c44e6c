"""Scores of an existing run over a split of its data."""

from __future__ import annotations

from pathlib import Path

from smoe_hpc.errors import CheckpointError
from smoe_hpc.runs import Scores
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.training.batches import require_finite
from smoe_hpc.training.checkpoint import Checkpoints
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.failures import shared_failures
from smoe_hpc.training.processes import Processes, join
from smoe_hpc.training.scoring import score
from smoe_hpc.training.state import load_model, refuse_other_data, resume_state
from smoe_hpc.training.task import Task


def evaluate(run_dir: str | Path, split: str, *, task: Task, same_data: bool = True) -> Scores:
    """Scores of a run's best checkpoint (of its newest, while it trains) over a split. Collective over all processes.

    Args:
        run_dir: the run's folder; only read.
        split: "train", "validation" or "test".
        task: the task of the run's recipe (`RunDirectory.recipe`).
        same_data: refuse data other than those that the run was trained on.

    Returns:
        {region: {score: value}}.

    Raises:
        RunError: the folder is not a run, or is of other data; a score is not finite; another rank failed.
        CheckpointError: it has no checkpoint, or one of another model.
    """
    processes = join()
    with shared_failures(processes):
        return _evaluate(RunDirectory(Path(run_dir)), split, task, processes, same_data)


def _evaluate(run: RunDirectory, split: str, task: Task, processes: Processes, same_data: bool) -> Scores:
    recipe = processes.on_first(run.recipe)
    checkpoints = Checkpoints(run.checkpoints, processes, recipe.run.keep)
    ended = processes.on_first(run.ending)
    best = None if ended is None else ended.best_step
    saved = checkpoints.newest() if best is None else checkpoints.at(best)
    if saved is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet; train it first")
    if best is None:  # still training: the best so far, if it is not the newest
        best = resume_state(saved)[0].plateau.best_step
        saved = saved if best is None else checkpoints.at(best)
    of_run = saved
    if same_data:
        processes.together(lambda: refuse_other_data(task, run.path, of_run.identity))
    engine = Engine(task.build_model(), recipe, processes)
    load_model(engine, saved, task)
    scores = score(engine, task, split, recipe, processes)
    require_finite(scores, task.samples(split), split)
    return scores
