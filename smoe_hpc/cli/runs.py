"""Verbs that make runs and show them: train, evaluate, report, compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from smoe_hpc.cli.arguments import SPLITS, Overrides, RecipeName, Resume, RunFolder, RunName
from smoe_hpc.cli.figures import JsonFile, write_json
from smoe_hpc.cli.output import say, show, show_scores
from smoe_hpc.cli.paths import user_path
from smoe_hpc.errors import ConfigError, RunError


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and stop; works without data too.")
    ] = False,
    run_name: RunName = None,
    resume: Resume = True,
    json_file: JsonFile = None,
) -> None:
    """Train a recipe, in this process or in those that srun, torchrun or mpirun start."""
    from smoe_hpc.launch.stopping import handle_stop_signals

    with handle_stop_signals():  # imports and opening the data take a while, and a signal may come meanwhile
        _train(recipe, overrides, dry_run, run_name, resume, json_file)


def _train(
    recipe: str, overrides: list[str] | None, dry_run: bool, run_name: str | None, resume: bool, json_file: Path | None
) -> None:
    from smoe_hpc.config import check_world, load_recipe
    from smoe_hpc.launch.ranks import find_ranks

    named = [] if run_name is None else [f"name={run_name}"]
    loaded = load_recipe(recipe, [*(overrides or []), *named])
    world = find_ranks(os.environ).world
    check_world(loaded, world)
    if dry_run:
        from smoe_hpc.cli.dry_run import describe

        describe(loaded, world, json_file)
        return
    from smoe_hpc.jobs.queue import train_or_requeue
    from smoe_hpc.runs.directory import RunDirectory
    from smoe_hpc.tasks import make_task

    scores = train_or_requeue(loaded, make_task(loaded), run_dir=RunDirectory.of(loaded).path, resume=resume)
    show_scores(scores)
    write_json(json_file, scores)


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    data: Annotated[
        Path | None,
        typer.Option(parser=user_path, metavar="STORE", help="Other data than the run's: a store, a folder, a pattern."),
    ] = None,
    first: Annotated[str | None, typer.Option("--from", metavar="DAY", help="First day to score, e.g. 2019-01-01.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="DAY", help="Last day to score, targets included.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Score a run's best checkpoint on a split, on other days, or on other data."""
    from smoe_hpc.config.rules import one_of
    from smoe_hpc.experiments import evaluate as evaluate_run

    one_of("split", split, SPLITS)
    scores = evaluate_run(run, split, data=data, first=first, last=last)  # type: ignore[arg-type]
    name = split if data is None and first is None and last is None else f"{first or 'first day'} to {last or 'last day'}"
    show_scores({name: scores})
    write_json(json_file, {name: scores})


def report(runs: Annotated[list[Path], typer.Argument(parser=user_path, metavar="RUN...", help="Folders of runs.")]) -> None:
    """Draw the pictures of runs again."""
    from smoe_hpc.report import make_pictures

    for run in runs:
        drawn = make_pictures(run)
        if not drawn:
            raise RunError(f"{run}: there is nothing to draw, it has made no steps that were written down; train it first")
        for picture in drawn:
            say(str(picture))


def compare(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes, and changes to all of them.")
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps that each recipe makes at most; its own limit if not given.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Minutes that each may take in this call; a busy machine makes fewer steps."),
    ] = None,
    resume: Resume = True,
    json_file: JsonFile = None,
) -> None:
    """Train recipes one after another and print their test scores per region side by side.

    Runs that are there are resumed. --steps gives each as many steps, however busy the machine is, and the table shows the
    seconds; --minutes is a budget of time for this call alone, and the table shows the steps.
    """
    recipes = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if not recipes:
        raise RunError("no recipe to compare; name one or more, e.g. smoe-hpc compare heat_smoe heat_conv2")
    if minutes is not None and steps is not None:
        raise ConfigError("--steps and --minutes are two measures; give one")
    if steps is not None:
        overrides.append(f"training.max_steps={steps}")
    title = "test split: {}"
    if minutes is not None:
        from smoe_hpc.launch.ranks import find_ranks

        world = find_ranks(os.environ).world
        if world > 1:
            raise ConfigError(
                f"--minutes: this is one of {world} processes, and the budget is kept by one that starts the others; call "
                "compare without a launcher, or leave out --minutes"
            )
        title += f", at most {minutes:g} minutes each in this call"
    from smoe_hpc.jobs.compare import as_table, compared_score
    from smoe_hpc.jobs.compare import compare as train_all

    rows = train_all(recipes, overrides, seconds=None if minutes is None else 60 * minutes, resume=resume)
    score = compared_score(rows[0].scores)
    show(as_table(rows, score, title.format(score)))
    write_json(json_file, [vars(row) for row in rows])
