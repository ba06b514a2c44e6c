"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoe_hpc.cli import completion
from smoe_hpc.cli.paths import user_path

SPLITS = ("train", "validation", "test")
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A name from `smoe-hpc recipes`, or a YAML file.", autocompletion=completion.recipe_argument
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipe, e.g. training.batch=64; `smoe-hpc recipes RECIPE` explains its keys.",
        autocompletion=completion.override_argument,
    ),
]
RunName = Annotated[str | None, typer.Option(help="Name of the run's folder; the recipe's if not given.")]
RunFolder = Annotated[Path, typer.Argument(parser=user_path, metavar="RUN", help="Folder of a run, e.g. runs/heat_quickstart.")]
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", help="Resume the run if there is one, or insist on a new one.", show_default="resume"),
]
