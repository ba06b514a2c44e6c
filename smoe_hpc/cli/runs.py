"""Verbs that make runs and look at them: train, evaluate, report, compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smoe_hpc.cli.output import JsonFile, say, show, show_scores, show_table, write_json
from smoe_hpc.errors import ConfigError, RunError

if TYPE_CHECKING:
    from smoe_hpc.config import Recipe

SPLITS = ("train", "validation", "test")
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `smoe-hpc recipes`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. training.batch=64.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, e.g. runs/heat_quickstart.")]
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", help="Go on where the run stopped, or insist on a new one.", show_default="resume"),
]


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
    run_name: Annotated[str | None, typer.Option(help="Name of the run's folder; the recipe's if not given.")] = None,
    resume: Resume = True,
    json_file: JsonFile = None,
) -> None:
    """Train a recipe; under srun, torchrun or mpirun with all their processes."""
    from smoe_hpc.launch.stopping import listening

    with listening():  # importing and opening take a while, and a signal may come during it
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
        _describe(loaded, world, json_file)
        return
    from smoe_hpc.tasks import make_task
    from smoe_hpc.training import train_or_requeue

    scores = train_or_requeue(loaded, make_task(loaded), run_dir=Path(loaded.run.root) / loaded.name, resume=resume)
    show_scores(scores)
    write_json(json_file, scores)


def _describe(recipe: Recipe, world: int, json_file: Path | None) -> None:
    """The resolved recipe, and how large model and data are."""
    from smoe_hpc.config import to_yaml
    from smoe_hpc.tasks import make_task

    task = make_task(recipe)
    samples = {split: len(task.samples(split)) for split in SPLITS}
    parameters = sum(parameter.numel() for parameter in task.build_model().parameters())
    steps = samples["train"] // recipe.training.batch
    if steps == 0:
        raise RunError(
            f"training.batch={recipe.training.batch}: the training split holds only {samples['train']} samples; take a "
            "smaller batch or more data"
        )
    say(to_yaml(recipe))
    say(f"parameters       {parameters:,}")
    for split, number in samples.items():
        say(f"{split + ' samples':<16} {number:,}")
    say(f"steps per epoch  {steps:,} of {recipe.training.batch} samples on {world} process(es)")
    write_json(json_file, {"parameters": parameters, "samples": samples, "steps_per_epoch": steps, "world": world})


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    json_file: JsonFile = None,
) -> None:
    """Score a run's best checkpoint on a split."""
    from smoe_hpc.config.checks import known
    from smoe_hpc.tasks import make_task
    from smoe_hpc.training import RunDirectory
    from smoe_hpc.training import evaluate as evaluate_run

    known("split", split, SPLITS)
    scores = evaluate_run(run, split, task=make_task(RunDirectory(run).recipe()))
    show_scores({split: scores})
    write_json(json_file, {split: scores})


def report(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")]) -> None:
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
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Time that each recipe may take; to its own end if not given.")
    ] = None,
    resume: Resume = True,
    json_file: JsonFile = None,
) -> None:
    """Train recipes one after another and print their test scores per region side by side."""
    recipes = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if not recipes:
        raise RunError("no recipe to compare; name one or more, e.g. smoe-hpc compare heat_smoe heat_conv2")
    if minutes is None:
        _compare_to_the_end(recipes, overrides, resume, json_file)
        return
    from smoe_hpc.cli.comparison import train_within
    from smoe_hpc.launch.ranks import find_ranks

    world = find_ranks(os.environ).world
    if world > 1:
        raise ConfigError(
            f"--minutes: this is one of {world} processes, and the budget is kept by one that starts the others; call "
            "compare without a launcher, or leave out --minutes"
        )
    rows = [train_within(recipe, overrides, seconds=60 * minutes, resume=resume) for recipe in recipes]
    regions = list(dict.fromkeys(region for row in rows for region in row.scores))
    title = f"test split: {rows[0].score}, at most {minutes:g} minutes each"
    show_table(title, ["recipe", "seconds", "ended", *regions], [row.cells(regions) for row in rows])
    write_json(json_file, [vars(row) for row in rows])


def _compare_to_the_end(recipes: list[str], overrides: list[str], resume: bool, json_file: Path | None) -> None:
    from smoe_hpc.cli.comparison import compared_score
    from smoe_hpc.tasks.compare import as_table
    from smoe_hpc.tasks.compare import compare as train_all

    rows = train_all(recipes, overrides, resume=resume)
    score = compared_score(rows[0].scores)
    show(as_table(rows, score, f"test split: {score}"))
    write_json(json_file, [vars(row) for row in rows])
