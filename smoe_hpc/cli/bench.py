"""Verbs that measure: ``smoe-hpc bench ...``."""

from __future__ import annotations

from typing import Annotated

import typer

from smoe_hpc.cli.output import JsonFile, say, show_table, write_json

app = typer.Typer(help="Measure, and write the figures down.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Measure, and write the figures down."""


@app.command()
def routing(
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda takes two minutes, cpu hours.")] = "cuda",
    epochs: Annotated[int, typer.Option(help="Epochs of each setting.")] = 5,
    runs: Annotated[int, typer.Option(help="Heat runs to learn from, 100 pairs each.")] = 400,
    seeds: Annotated[int, typer.Option(help="Starts of each setting.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Pixels on the right expert / re-routings an epoch, over quantile, N/K, noise, error scale, gate rate, damping."""
    from smoe_hpc.bench.routing import Scope, routing_study, tables

    rows = routing_study(Scope(epochs=epochs, runs=runs, seeds=seeds), device, say)
    for title, columns, cells in tables(rows):
        show_table(title, columns, cells)
    write_json(json_file, rows)
