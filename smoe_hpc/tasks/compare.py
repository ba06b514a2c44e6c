"""Recipes trained one after the other to the end, and their table: parameters, steps, time, scores per region."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from smoe_hpc.config import load_recipe
from smoe_hpc.scores import Results
from smoe_hpc.tasks import make_task
from smoe_hpc.training import train


@dataclass(frozen=True)
class Row:
    """What one recipe reached.

    Args:
        recipe: its name.
        parameters: of the model, gates included.
        steps: optimiser steps that were made.
        seconds: wall-clock time of the training loop, validations included, over all the times it was taken up.
        scores: of the best checkpoint on the test split.
        run_dir: where the run lies.
    """

    recipe: str
    parameters: int
    steps: int
    seconds: float
    scores: Results
    run_dir: str


def compare(
    recipes: Sequence[str], overrides: Sequence[str] = (), *, resume: bool = True, progress: bool = True
) -> list[Row]:
    """Train each recipe to its end, or take up what is there; one row each.

    Args:
        recipes: names or YAML files.
        overrides: ``key=value`` for all of them.
        resume: False refuses folders that hold a run.
        progress: show how far each is.

    Raises:
        SmoeError: what loading, data and training raise.
    """
    rows = []
    for name in recipes:
        recipe = load_recipe(name, list(overrides))
        run_dir = Path(recipe.run.root) / recipe.name
        task = make_task(recipe)
        parameters = sum(parameter.numel() for parameter in task.build_model().parameters())
        scores = train(recipe, task, run_dir=run_dir, resume=resume, progress=progress)
        steps = int(json.loads((run_dir / "finished.json").read_text())["step"])
        rows.append(Row(recipe.name, parameters, steps, training_seconds(run_dir), scores["test"], str(run_dir)))
    return rows


def training_seconds(run_dir: Path) -> float:
    """Wall-clock seconds of a run's training loop, from its timing.jsonl."""
    lines = (run_dir / "timing.jsonl").read_text().splitlines()
    return sum(json.loads(line).get("seconds", 0.0) for line in lines)


def as_table(rows: Sequence[Row], score: str, heading: str) -> Table:
    """The rows as a table for people: one column a region, and the routing's agreement where it is known.

    Args:
        rows: of `compare`.
        score: the score to show.
        heading: what it is, with its unit.
    """
    regions = list(dict.fromkeys(region for row in rows for region, scores in row.scores.items() if score in scores))
    routed = any("routing_agreement" in row.scores["all"] for row in rows)
    table = Table(title=heading, title_justify="left")
    table.add_column("recipe", no_wrap=True)
    for name in ("parameters", "steps", "seconds", *(region.replace("_", " ") for region in regions)):
        table.add_column(name, justify="right", no_wrap=True)
    if routed:
        table.add_column("routing agreement", justify="right")
    for row in rows:
        cells = [row.recipe, f"{row.parameters:,}", f"{row.steps:,}", f"{row.seconds:.1f}"]
        cells += [_figure(row.scores.get(region, {}).get(score)) for region in regions]
        if routed:
            cells.append(_figure(row.scores["all"].get("routing_agreement")))
        table.add_row(*cells)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def as_json(rows: Sequence[Row]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"
