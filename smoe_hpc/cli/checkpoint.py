"""Verbs for checkpoints: checkpoint upgrade."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoe_hpc.cli.output import say
from smoe_hpc.cli.paths import user_path

app = typer.Typer(help="Checkpoints of earlier versions.", no_args_is_help=True)


@app.callback()
def _checkpoint() -> None:
    """Checkpoints of earlier versions."""


@app.command()
def upgrade(
    old: Annotated[
        Path,
        typer.Argument(
            parser=user_path, metavar="OLD", help="A checkpoint (step_N) or a run of an earlier version; only read."
        ),
    ],
    new: Annotated[Path, typer.Argument(parser=user_path, metavar="NEW", help="Folder to make; it must not exist.")],
) -> None:
    """Write a checkpoint, or a run with all of its checkpoints, in today's form, without running any code in it."""
    from smoe_hpc.training.checkpoint.upgrade import upgrade as upgrade_to

    for made in upgrade_to(old, new):
        say(str(made))
    if (new / "checkpoints").is_dir():
        say(f"to go on with the run, put {new} in the place of {old} and start its command again")
