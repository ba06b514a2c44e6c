"""The command ``smoe-hpc``: each verb is a thin call into the package, which is imported only when the verb runs.

Verbs stand in `runs.py` (train, evaluate, report, compare), `data.py` (data ...), `bench.py` (bench ...), `kernels.py`
(kernels ...), `jobs.py` (submit, status) and `machine.py` (recipes, doctor, quickstart). What they share stands in
`output.py`: who prints, tables, JSON files, how an error ends the command; and in `teamwork.py`: how the processes of a data
verb work and stop together.
"""

from __future__ import annotations

import typer

from smoe_hpc.cli import bench, data, jobs, kernels, machine, runs
from smoe_hpc.cli.output import Commands

app = typer.Typer(
    cls=Commands,
    help="Spatial Mixture-of-Experts: train, evaluate and look at weather models whose layers know where they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(machine.quickstart)
app.command()(runs.train)
app.command()(runs.evaluate)
app.command()(runs.report)
app.command()(runs.compare)
app.command()(jobs.submit)
app.command()(jobs.status)
app.command()(machine.recipes)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(kernels.app, name="kernels")
app.command()(machine.doctor)


def main() -> None:
    """Entry point of ``smoe-hpc`` and ``python -m smoe_hpc``."""
    app(prog_name="smoe-hpc")
