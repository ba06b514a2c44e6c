"""Recipes trained one after the other, and their table: parameters, steps, time, scores per region.

Each is trained to its end, or for a time budget (`budget.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table
from rich.text import Text

from smoe_hpc.config import Recipe, load_recipe
from smoe_hpc.errors import RunError
from smoe_hpc.jobs.budget import train_within
from smoe_hpc.jobs.queue import drawing
from smoe_hpc.runs import Scores
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.tasks import make_task
from smoe_hpc.text import printable
from smoe_hpc.training import train

_SCORES = ("within_1pct", "rmse")  # the score to compare: the first that the task has


@dataclass(frozen=True)
class Row:
    """What one recipe reached.

    Attributes:
        recipe: its name.
        parameters: of the model, gates included; None where the run was made in a process of its own.
        steps: optimiser steps that the run has made, in earlier calls as well; None where it made none.
        seconds: wall-clock time of the training loop, validations included, over all the times it was taken up.
        scores: on the test split; of the best checkpoint so far.
        run_dir: where the run lies.
        ended: why it ended: "epochs", "max_steps", "early_stop" or "stop_at_score"; within a time budget "finished" or
            "budget spent".
        spent: seconds of the whole process in this call; None without a time budget.
    """

    recipe: str
    parameters: int | None
    steps: int | None
    seconds: float
    scores: Scores
    run_dir: str
    ended: str = ""
    spent: float | None = None


def compare(
    recipes: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    seconds: float | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[Row]:
    """Train each recipe, or take up what is there; one row each.

    Args:
        recipes: names or YAML files.
        overrides: ``key=value`` for all of them.
        seconds: time budget of each in this call, kept by a process of its own; None trains each to its end.
        resume: False refuses folders that hold a run.
        progress: show how far each is; within a budget it is always shown.

    Raises:
        SmoeError: what loading, data and training raise.
    """
    loaded = [load_recipe(name, list(overrides)) for name in recipes]  # all, before the first trains
    if seconds is not None:
        pairs = zip(recipes, loaded, strict=True)
        return [_within(name, overrides, RunDirectory.of(recipe), seconds, resume) for name, recipe in pairs]
    return [_to_the_end(recipe, resume, progress) for recipe in loaded]


def _to_the_end(recipe: Recipe, resume: bool, progress: bool) -> Row:
    run = RunDirectory.of(recipe)
    task = make_task(recipe)
    parameters = sum(parameter.numel() for parameter in task.build_model().parameters())
    scores = train(recipe, task, run_dir=run.path, resume=resume, progress=progress, draw=drawing(task))
    ended = run.ending()
    if ended is None:
        raise RunError(f"{run.finished} was removed while the runs were compared; compare them again")
    _, seconds = so_far(run)
    return Row(recipe.name, parameters, ended.position.step, seconds, scores["test"], str(run.path), ended.reason)


def _within(name: str, overrides: Sequence[str], run: RunDirectory, budget: float, resume: bool) -> Row:
    outcome = train_within(name, overrides, run_dir=run.path, seconds=budget, resume=resume)
    steps, seconds = so_far(run)
    ended = "finished" if outcome.finished else "budget spent"
    return Row(name, None, steps, seconds, outcome.scores, str(run.path), ended, outcome.seconds)


def so_far(run: RunDirectory) -> tuple[int | None, float]:
    """Steps that a run has made, None where none were written down, and wall-clock seconds of its training loop; over all
    the times it was taken up, from what its timing.jsonl still has.
    """
    steps, seconds = None, 0.0
    for timing in run.timing_events():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that is not ours
            steps, seconds = int(timing["step"]), seconds + float(timing.get("seconds", 0.0))
    return steps, seconds


def compared_score(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The score that a table shows, from {region: {score: value}}."""
    return next((name for name in _SCORES if name in scores["all"]), next(iter(scores["all"])))


def as_table(rows: Sequence[Row], score: str, heading: str) -> Table:
    """The rows as a table for people: one column a region, and the routing's agreement where it is known.

    Where there was a time budget, or not all ended for the same reason, a column says why each did.

    Args:
        rows: of `compare`.
        score: the score to show.
        heading: what it is, with its unit.
    """
    regions = list(dict.fromkeys(region for row in rows for region, scores in row.scores.items() if score in scores))
    budget = any(row.spent is not None for row in rows)
    columns = {"recipe": [row.recipe for row in rows]}
    if any(row.parameters is not None for row in rows):
        columns["parameters"] = ["-" if row.parameters is None else f"{row.parameters:,}" for row in rows]
    columns["steps"] = ["-" if row.steps is None else f"{row.steps:,}" for row in rows]
    if budget:
        columns["seconds"] = ["-" if row.spent is None else f"{row.spent:.1f}" for row in rows]
    columns["training in all" if budget else "seconds"] = [f"{row.seconds:.1f}" for row in rows]
    for region in regions:
        columns[region.replace("_", " ")] = [_figure(row.scores.get(region, {}).get(score)) for row in rows]
    if any("routing_agreement" in row.scores["all"] for row in rows):
        columns["routing agreement"] = [_figure(row.scores["all"].get("routing_agreement")) for row in rows]
    if budget or len({row.ended for row in rows}) > 1:
        columns["ended" if budget else "ended by"] = [row.ended for row in rows]
    table = Table(title=Text(printable(heading)), title_justify="left")
    for name in columns:
        left = name in ("recipe", "ended", "ended by")
        table.add_column(Text(printable(name)), justify="left" if left else "right", no_wrap=name != "routing agreement")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"


def as_json(rows: Sequence[Row]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"
