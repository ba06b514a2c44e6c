"""A whole run: claim its folder, go on from where it stands, train, score the best weights, write down what came
out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smoe_hpc.config import Recipe
from smoe_hpc.errors import RunError
from smoe_hpc.training import files
from smoe_hpc.training.batches import require_finite
from smoe_hpc.training.checkpoint import Checkpoints, Saved
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.failures import shared_failures
from smoe_hpc.training.loop import Loop
from smoe_hpc.training.memory import keep_freed_memory
from smoe_hpc.training.metrics import Log
from smoe_hpc.training.position import Position, resume_state
from smoe_hpc.training.processes import Processes, join
from smoe_hpc.training.progress import Watch
from smoe_hpc.training.run_directory import RunDirectory
from smoe_hpc.training.scoring import score
from smoe_hpc.training.signals import Requests
from smoe_hpc.training.state import grid_in_words, load_everything, load_model, model_tensors, refuse_other_data
from smoe_hpc.training.task import Scores, Task

_log = logging.getLogger(__name__)


def train(recipe: Recipe, task: Task, *, run_dir: str | Path, resume: bool = True, progress: bool = True) -> dict[str, Scores]:
    """Train a recipe's model, or go on with it. Collective over all processes of the job.

    A run that was killed goes on from its newest whole checkpoint and ends with the same numbers, to the bit on a CPU. A
    run that has ended is not trained again. SIGTERM and SIGUSR1 make all ranks save and stop.

    Args:
        recipe: what to train and how.
        task: the recipe's task.
        run_dir: the run's folder, created if missing.
        resume: False refuses a folder that holds a run.
        progress: show how far it is.

    Returns:
        {split: {region: {score: value}}} of the best checkpoint, for validation and test; also in scores.json.

    Raises:
        RunError: the folder is in use, belongs to another recipe or to other data, or has been trained for longer than
            the recipe asks; a loss or score is not finite; another rank failed.
        RunInterrupted: a signal asked to stop.
        CheckpointError: a checkpoint cannot be written, or those there are damaged or of another model.
        DataError: the data cannot be read.
    """
    processes = join()
    run = RunDirectory(Path(run_dir))
    with contextlib.ExitStack() as held:
        processes.on_first(lambda: _enter(held, run))
        processes.on_first(lambda: run.check(recipe, resume))
        scores = processes.on_first(lambda: _scores_of_ended(recipe, task, run))
        if scores is None:
            held.enter_context(_arithmetic(recipe, processes))
            scores = _train(recipe, task, run, processes, progress)
        return scores


def _scores_of_ended(recipe: Recipe, task: Task, run: RunDirectory) -> dict[str, Scores] | None:
    """Scores of a run that has nothing more to do, of this recipe and these data; else None."""
    ended, scores = run.ended_at(), run.finished_scores(recipe)
    if ended is None or scores is None:
        return None
    position, identity = ended
    _refuse_beyond(recipe, run, position)
    refuse_other_data(task, run.path, identity)
    run.claim(recipe)
    return scores


def _refuse_beyond(recipe: Recipe, run: RunDirectory, position: Position) -> None:
    """RunError if the run has gone on for longer than the recipe asks: what it has would pass for a shorter run."""
    steps, epochs = recipe.training.max_steps, recipe.training.epochs
    begun = position.epoch + (position.in_epoch > 0)
    if steps is not None and position.step > steps:
        key, asked, least = "max_steps", steps, position.step
    elif begun > epochs:
        key, asked, least = "epochs", epochs, begun
    else:
        return
    raise RunError(
        f"run directory {run.path} is at step {position.step} in epoch {position.epoch}, beyond training.{key}={asked}; "
        f"train under another --run-name, or give the old limit (training.{key}={least} or more)"
    )


def _enter(held: contextlib.ExitStack, run: RunDirectory) -> None:
    held.enter_context(run.locked())


def _train(recipe: Recipe, task: Task, run: RunDirectory, processes: Processes, progress: bool) -> dict[str, Scores]:
    checkpoints = Checkpoints(run.checkpoints, processes, recipe.run.keep)
    saved = checkpoints.newest()
    position, sizes = resume_state(saved)
    processes.on_first(lambda: _refuse_beyond(recipe, run, position))
    if saved is not None:
        processes.together(lambda: refuse_other_data(task, run.path, saved.identity))
    processes.on_first(lambda: run.claim(recipe))
    processes.on_first(run.reopen)
    processes.on_first(checkpoints.clear_partial)
    with shared_failures(processes):
        return _train_from(saved, position, sizes, recipe, task, run, checkpoints, processes, progress)


def _train_from(
    saved: Saved | None,
    position: Position,
    sizes: dict[str, int],
    recipe: Recipe,
    task: Task,
    run: RunDirectory,
    checkpoints: Checkpoints,
    processes: Processes,
    progress: bool,
) -> dict[str, Scores]:
    torch.manual_seed(recipe.training.seed)  # a model that draws from torch's generator starts alike on every rank
    engine = Engine(task.build_model(), recipe, processes)
    if saved is not None:
        load_everything(engine, saved, task)
    total = _steps_at_most(recipe, task)
    watch = Watch(recipe.name, total, position.step, progress and processes.first)
    if saved is not None:
        watch.say(f"goes on from step {position.step}, epoch {position.epoch}")
    try:
        with (
            Log(run.path, sizes, active=processes.first, tensorboard=recipe.run.tensorboard, step=position.step) as log,
            Requests(processes) as requests,
        ):
            loop = Loop(recipe, task, engine, position, checkpoints, log, watch, processes)
            reason = loop.run(requests)
            best = loop.validate_last()
    finally:
        watch.close()
    load_model(engine, checkpoints.at(best), task)
    scores = {split: score(engine, task, split, recipe, processes) for split in ("validation", "test")}
    for split, of_split in scores.items():
        require_finite(of_split, task.samples(split), split)
    processes.on_first(lambda: _write_results(recipe, task, run, engine, reason, loop, best, scores))
    return scores


def _write_results(
    recipe: Recipe,
    task: Task,
    run: RunDirectory,
    engine: Engine,
    reason: str,
    loop: Loop,
    best: int,
    scores: dict[str, Scores],
) -> None:
    from safetensors.torch import save

    weights = {name.removeprefix("model."): t.detach().cpu().contiguous() for name, t in model_tensors(engine).items()}
    about = json.dumps({"recipe": recipe.name, "step": best, "grid": grid_in_words(task)})
    files.write_whole(run.weights, save(weights, metadata={"smoe_hpc": about}))  # one key: safetensors orders several at random
    run.finish(recipe, reason, loop.position, best, scores, loop.identity)
    if recipe.run.pictures:
        try:
            task.pictures(run.path, engine.model)
        except Exception as error:  # the run is done and written down; a missing font must not make it fail
            _log.warning("pictures of %s were not drawn (%s: %s)", run.path, type(error).__name__, error)


def _steps_at_most(recipe: Recipe, task: Task) -> int:
    steps = recipe.training.epochs * max(len(task.samples("train")) // recipe.training.batch, 1)
    return steps if recipe.training.max_steps is None else min(steps, recipe.training.max_steps)


@contextlib.contextmanager
def _arithmetic(recipe: Recipe, processes: Processes) -> Iterator[None]:
    """Threads and determinism as the recipe has them; restored at the end, for they belong to the whole process."""
    training = recipe.training
    deterministic = processes.device.type == "cpu" if training.deterministic is None else training.deterministic
    threads, before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    debugging: Any = torch.utils.deterministic  # its attributes are properties, which type checkers do not see
    fill = debugging.fill_uninitialized_memory
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    if processes.device.type == "cpu":
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
        torch.backends.cudnn.benchmark = False
    # the same switch as torch.use_deterministic_algorithms, which would import the compiler (2 s)
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    debugging.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor
    try:
        yield
    finally:
        debugging.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(before)
        torch.set_num_threads(threads)
