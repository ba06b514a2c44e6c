"""Verbs for a first look: quickstart, recipes, doctor."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from smoe_hpc.cli import completion
from smoe_hpc.cli.arguments import Overrides
from smoe_hpc.cli.figures import JsonFile, write_json
from smoe_hpc.cli.output import say, show
from smoe_hpc.cli.paths import user_path

_WIDTH = 120  # columns of an explanation, at most


def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to both recipes, e.g. training.max_steps=300.")
    ] = None,
    out: Annotated[Path, typer.Option(parser=user_path, help="Folder for the runs.")] = Path("runs"),
    data: Annotated[Path, typer.Option(parser=user_path, help="Folder for the heat data; written if missing.")] = Path(
        "data/heat"
    ),
    json_file: JsonFile = None,
) -> None:
    """Train an SMoE layer and a small CNN on heat diffusion; print a table, draw pictures (minutes on two cores)."""
    from smoe_hpc.jobs.quickstart import run

    rows = run(out, data, overrides=overrides or ())
    if json_file is not None:
        write_json(json_file, [asdict(row) for row in rows])


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="Explain the keys of this one: its values, their defaults, what they may be and what they mean.",
            autocompletion=completion.recipe_argument,
        ),
    ] = None,
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """List the experiments that come with the package, or explain every key of one of them; needs no data."""
    from smoe_hpc.config import load_recipe, recipe_names, recipe_summary

    if recipe is not None:
        from smoe_hpc.config.reference import explained, lines

        loaded = load_recipe(recipe, overrides or [])
        for line in lines(loaded, min(shutil.get_terminal_size((_WIDTH, 1)).columns, _WIDTH)):
            say(line)
        write_json(json_file, explained(loaded))
        return
    summaries = {name: recipe_summary(name) for name in recipe_names()}
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        say(f"{name:{width}}  {summary}")
    write_json(json_file, summaries)


def doctor(json_file: JsonFile = None) -> None:
    """Show what this machine has (GPUs, NCCL, MPI, Slurm, compiler), what will be used, and why."""
    from smoe_hpc.launch import doctor as machine

    found = machine.inspect_machine()
    show(machine.render(found))
    write_json(json_file, [asdict(finding) for finding in found])
