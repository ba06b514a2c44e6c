"""A whole run: claim its folder, resume, train, score the best weights, write the results."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smoe_hpc.config import Recipe
from smoe_hpc.errors import CheckpointError, RunError
from smoe_hpc.runs import Scores, layout
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.runs.position import Position
from smoe_hpc.training.batches import require_finite
from smoe_hpc.training.checkpoint import Checkpoints, Saved
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.failures import shared_failures
from smoe_hpc.training.loop import Loop
from smoe_hpc.training.memory import keep_freed_memory
from smoe_hpc.training.metrics import Log
from smoe_hpc.training.model_files import write_description, write_model
from smoe_hpc.training.processes import Processes, join
from smoe_hpc.training.progress import Watch
from smoe_hpc.training.scoring import score
from smoe_hpc.training.signals import Requests
from smoe_hpc.training.state import grid_in_words, load_everything, load_model, model_tensors, refuse_other_data, resume_state
from smoe_hpc.training.task import Draw, Task

_log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    task: Task,
    *,
    run_dir: str | Path,
    resume: bool = True,
    progress: bool = True,
    draw: Draw | None = None,
) -> dict[str, Scores]:
    """Train a recipe's model, or go on with it. Collective over all processes of the job.

    A run that was killed goes on from its newest whole checkpoint and ends with the same numbers, to the bit on a CPU. A
    run that has ended is not trained again. SIGTERM and SIGUSR1 make all ranks save and stop.

    Args:
        recipe: what to train and how.
        task: the recipe's task.
        run_dir: the run's folder, created if missing.
        resume: False refuses a folder that holds a run.
        progress: show progress on stderr.
        draw: draws the pictures of the run that has just ended, on rank 0, unless ``run.pictures`` is false; if it fails,
            a warning says so and the run counts all the same.

    Returns:
        {split: {region: {score: value}}} of the best checkpoint, for validation and test; also in scores.json.

    Raises:
        RunError: the folder is in use, belongs to another recipe or to other data, or has been trained for longer than
            the recipe asks; a loss or score is not finite; another rank failed.
        RunInterrupted: it was signalled to stop.
        CheckpointError: a checkpoint cannot be written, or those there are damaged or of another model.
        DataError: the data cannot be read.
    """
    processes = join()
    run = RunDirectory(Path(run_dir))
    with contextlib.ExitStack() as held:
        held.enter_context(shared_failures(processes))
        processes.on_first(lambda: _enter(held, run))
        processes.on_first(lambda: run.check(recipe, resume))
        scores = processes.on_first(lambda: _scores_of_ended(recipe, task, run))
        if scores is None:
            held.enter_context(_arithmetic(recipe, processes))
            scores, model = _train(recipe, task, run, processes, progress)
            if draw is not None and recipe.run.pictures:
                processes.on_first(lambda: _draw(draw, run, model))
            return scores
        ended = run.ending() if progress and processes.first else None
        if ended is not None:
            watch = Watch(recipe.name, 0, 0, active=True)
            watch.say(ended.how_to_go_on())
            watch.close()
        return scores


def _scores_of_ended(recipe: Recipe, task: Task, run: RunDirectory) -> dict[str, Scores] | None:
    """Scores of a run that has nothing more to do, of this recipe and these data; else None."""
    ended = run.ending()
    scores = None if ended is None else run.finished_scores(recipe, ended)
    if ended is None or scores is None:
        return None
    _refuse_beyond(recipe, run, ended.position)
    refuse_other_data(task, run.path, ended.identity)
    run.claim(recipe)
    if not (run.path / layout.MODEL).exists():  # of an early version
        write_description(run, task, ended.best_step)
    return scores


def _refuse_beyond(recipe: Recipe, run: RunDirectory, position: Position) -> None:
    """RunError if the run has gone on for longer than the recipe asks: what it has would pass for a shorter run."""
    steps, epochs = recipe.training.max_steps, recipe.training.epochs
    begun = position.epoch + (position.in_epoch > 0)
    if steps is not None and position.step > steps:
        key, limit, least = "max_steps", steps, position.step
    elif begun > epochs:
        key, limit, least = "epochs", epochs, begun
    else:
        return
    raise RunError(
        f"run directory {run.path} is at step {position.step} in epoch {position.epoch}, beyond training.{key}={limit}; "
        f"train under another run.root or --run-name, or give the old limit (training.{key}={least} or more)"
    )


def _enter(held: contextlib.ExitStack, run: RunDirectory) -> None:
    held.enter_context(run.locked())


def _train(
    recipe: Recipe, task: Task, run: RunDirectory, processes: Processes, progress: bool
) -> tuple[dict[str, Scores], nn.Module]:
    """Train to the end; scores of the best checkpoint, and the model as it was there."""
    checkpoints = Checkpoints(run.checkpoints, processes, recipe.run.keep)
    saved = checkpoints.newest(lambda found: _refuse_unusable(found, run, checkpoints))
    begun = processes.on_first(lambda: _how_it_begins(run, saved))
    position, sizes = resume_state(saved)
    processes.on_first(lambda: _refuse_beyond(recipe, run, position))
    if saved is not None:
        processes.together(lambda: refuse_other_data(task, run.path, saved.identity))
    processes.on_first(lambda: run.claim(recipe))
    processes.on_first(run.reopen)
    processes.on_first(checkpoints.clear_partial)
    return _train_from(saved, begun, position, sizes, recipe, task, run, checkpoints, processes, progress)


def _refuse_unusable(saved: Saved, run: RunDirectory, checkpoints: Checkpoints) -> None:
    """CheckpointError if a run cannot go on from a whole checkpoint: lines or the best weights it counts on are gone."""
    position, sizes = resume_state(saved)
    run.refuse_lost_lines(sizes)
    best = position.plateau.best_step
    if best not in (None, saved.step):
        try:
            checkpoints.check(best)
        except CheckpointError as error:
            raise CheckpointError(f"step_{saved.step} counts on a better one: {error}") from None


def _how_it_begins(run: RunDirectory, saved: Saved | None) -> str:
    """The first line of progress: where the run goes on, or that it starts anew, and why."""
    if saved is not None:
        position, _ = resume_state(saved)
        return f"goes on from step {position.step}, epoch {position.epoch} ({saved.path.name})"
    if run.has_lines():
        return "starts anew at step 0: it was stopped before its first checkpoint"
    return "starts at step 0: a new run"


def _train_from(
    saved: Saved | None,
    begun: str,
    position: Position,
    sizes: dict[str, int],
    recipe: Recipe,
    task: Task,
    run: RunDirectory,
    checkpoints: Checkpoints,
    processes: Processes,
    progress: bool,
) -> tuple[dict[str, Scores], nn.Module]:
    torch.manual_seed(recipe.training.seed)  # a model that draws from torch's generator starts alike on every rank
    engine = Engine(task.build_model(), recipe, processes)
    if saved is not None:
        load_everything(engine, saved, task)
    total = _steps_at_most(recipe, task)
    watch = Watch(recipe.name, total, position.step, progress and processes.first)
    watch.say(begun)
    try:
        with (
            Log(run, sizes, active=processes.first, tensorboard=recipe.run.tensorboard, step=position.step) as log,
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
    return scores, engine.model


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
    weights = {name.removeprefix("model."): tensor for name, tensor in model_tensors(engine).items()}
    write_model(run, task, weights, {"recipe": recipe.name, "step": best, "grid": grid_in_words(task)}, best)
    run.finish(recipe, reason, loop.position, best, scores, loop.identity)


def _draw(draw: Draw, run: RunDirectory, model: nn.Module) -> None:
    try:
        draw(run.path, model)
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
