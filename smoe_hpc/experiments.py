"""Experiments by name: recipes are trained and compared, runs evaluated, as the command does it.

scores = train("heat_smoe", {"training.seed": 1}, run_name="seed_1")
evaluate("runs/seed_1", "validation")["all"]
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from smoe_hpc.config import load_recipe
from smoe_hpc.config.changes import as_overrides
from smoe_hpc.jobs.compare import Row
from smoe_hpc.jobs.compare import compare as compare_recipes
from smoe_hpc.jobs.queue import drawing
from smoe_hpc.launch import rendezvous
from smoe_hpc.launch.ranks import find_ranks
from smoe_hpc.runs import Scores, description
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.tasks import make_task
from smoe_hpc.tasks.other_data import task_on
from smoe_hpc.training import evaluate as evaluate_run
from smoe_hpc.training import train as train_task


def train(
    recipe: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    run_name: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Scores]:
    """Train a recipe in this process, or go on with its run; what `smoe-hpc train` does.

    Args:
        recipe: a name from `smoe-hpc recipes`, or a YAML file.
        overrides: changes by dotted key, e.g. ``{"training.batch": 64}``.
        run_name: name of the run's folder in ``run.root``; the recipe's when None.
        resume: False refuses a folder that holds a run.
        progress: show how far it is.

    Returns:
        {split: {region: {score: value}}} of the best checkpoint, for validation and test.

    Raises:
        SmoeError: an impossible recipe, data that are missing or damaged, what `smoe_hpc.training.train` raises.
    """
    named = {} if run_name is None else {"name": run_name}
    loaded = load_recipe(os.fspath(recipe), as_overrides({**(overrides or {}), **named}))
    task, run_dir = make_task(loaded), RunDirectory.of(loaded).path
    with _group_of_its_own():
        return train_task(loaded, task, run_dir=run_dir, resume=resume, progress=progress, draw=drawing(task))


def evaluate(
    run: str | os.PathLike[str],
    split: Literal["train", "validation", "test"] = "test",
    *,
    data: str | os.PathLike[str] | None = None,
    first: str | None = None,
    last: str | None = None,
) -> Scores:
    """Scores of a run's best checkpoint; what `smoe-hpc evaluate` does.

    Args:
        run: the run's folder; only read.
        split: of the recipe. Not looked at where days are given, or data of times.
        data: a store other than the run's, with its channels and on its grid; normalised as the run's training data.
        first: first day to score, e.g. "2019-01-01"; the store's first when None.
        last: last day to score, inputs and targets included; the store's last when None.

    Returns:
        {region: {score: value}}.

    Raises:
        SmoeError: not a run, no checkpoint, data that are missing or do not fit.
    """
    folder = Path(run).expanduser()
    recipe = RunDirectory(folder).recipe()
    if data is None and first is None and last is None:
        task, same_data = make_task(recipe), True
    else:
        task, same_data = task_on(recipe, description.read(folder), data, first, last), False
    with _group_of_its_own():
        return evaluate_run(folder, split, task=task, same_data=same_data)


def compare(
    recipes: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    seconds: float | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[Row]:
    """Train several recipes, or take up what is there; a row of parameters, steps, time and scores each.

    Args:
        recipes: names or YAML files.
        overrides: changes to all of them, by dotted key.
        seconds: time that each may take in this call; None trains each to its end.
        resume: False refuses folders that hold a run.
        progress: show how far each is.

    Raises:
        SmoeError: what `train` raises.
    """
    changes = as_overrides(overrides or {})
    with _group_of_its_own():
        return compare_recipes(recipes, changes, seconds=seconds, resume=resume, progress=progress)


@contextlib.contextmanager
def _group_of_its_own() -> Iterator[None]:
    """End the process group that a process alone began: its variables would mislead processes that are started later."""
    began = not (dist.is_available() and dist.is_initialized())
    try:
        yield
    finally:
        if began and find_ranks(os.environ).world == 1:
            rendezvous.shutdown()
