"""The command ``smoe-hpc``: each verb is a thin call into the package, which is imported only when the verb runs.

Verbs stand in `runs.py` (train, evaluate, report, compare), `forecast.py`, `checkpoint.py` (checkpoint ...), `data.py`
(data ...), `bench.py` (bench ...), `kernels.py` (kernels ...), `jobs.py` (submit, status) and `machine.py` (recipes, doctor,
quickstart). They share `arguments.py`, `commands.py` (how an error ends the command), `output.py` (lines, tables, progress),
`figures.py` (JSON), `paths.py`, `completion.py`, and `data_jobs.py` (how the processes of a data verb work and stop together).
"""

from __future__ import annotations

from typing import Annotated

import typer

from smoe_hpc import __version__
from smoe_hpc.cli import bench, checkpoint, data, forecast, jobs, kernels, machine, runs
from smoe_hpc.cli.commands import Commands

app = typer.Typer(
    cls=Commands,
    help="Spatial Mixture-of-Experts: train, evaluate and look at weather models whose layers know where they are.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smoe-hpc {__version__}")
        raise typer.Exit


@app.callback()
def _every(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    pass


app.command()(machine.quickstart)
app.command()(runs.train)
app.command()(runs.evaluate)
app.command()(forecast.forecast)
app.command()(runs.report)
app.command()(runs.compare)
app.command()(jobs.submit)
app.command()(jobs.status)
app.command()(machine.recipes)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(kernels.app, name="kernels")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(machine.doctor)


def main() -> None:
    """Entry point of ``smoe-hpc`` and ``python -m smoe_hpc``."""
    app(prog_name="smoe-hpc")
