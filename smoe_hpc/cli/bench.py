"""Verbs that measure: ``smoe-hpc bench ...``."""

from __future__ import annotations

from pathlib import Path
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


@app.command()
def loader(
    folder: Annotated[Path, typer.Argument(help="Where the synthetic data go; they stay for the next time.")],
    grid: Annotated[str, typer.Option(help="Rows x columns.")] = "128x256",
    days: Annotated[int, typer.Option(min=12, help="Days of 6-hourly data: 20 MB each in float32 at 128x256.")] = 120,
    dtypes: Annotated[str, typer.Option(help="Types of store: float32, float16, int16.")] = "float32,int16",
    orders: Annotated[str, typer.Option(help="Orders of samples: global, blocks.")] = "global,blocks",
    fronts: Annotated[str, typer.Option(help="Fronts of the loader: plain, dali.")] = "plain,dali",
    batch: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 32,
    batches: Annotated[int, typer.Option(min=4, help="Batches timed for each line.")] = 20,
    long: Annotated[int, typer.Option(min=0, help="Batches of one more line, to see that memory does not grow.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Threads or processes of every reader.")] = 2,
    prefetch: Annotated[int, typer.Option(min=1, help="Batches read ahead.")] = 2,
    device: Annotated[str, typer.Option(help="Where batches are wanted: cpu or cuda.")] = "cpu",
    cold: Annotated[bool, typer.Option(help="Also with nothing in the page cache.")] = True,
    rivals: Annotated[bool, typer.Option(help="Also xarray and h5py with torch's DataLoader.")] = True,
    rate: Annotated[float, typer.Option(help="Samples a second that one GPU trains on.")] = 116.0,
    json_file: JsonFile = None,
) -> None:
    """Samples a second from the store, beside bare reads of the same files and beside xarray and h5py."""
    from smoe_hpc.bench.loader import COLUMNS, Scope, loader_study, needed_mb_per_second
    from smoe_hpc.cli.data import parse_grid

    scope = Scope(
        folder,
        parse_grid(grid),
        days,
        dtypes=_names(dtypes),
        orders=_names(orders),
        fronts=_names(fronts),
        batch=batch,
        batches=batches,
        long=long,
        workers=workers,
        prefetch=prefetch,
        device=device,
        cold=cold,
        rivals=rivals,
    )
    lines = loader_study(scope, say)
    show_table("three input fields of 38 channels, three target channels", COLUMNS, [line.cells() for line in lines])
    for dtype in scope.dtypes:
        needed = needed_mb_per_second(scope, dtype, rate)
        ours = [line.outcome for line in lines if line.dtype == dtype and line.outcome.case.reader in fronts.split(",")]
        best = max(outcome.samples_per_second for outcome in ours if outcome.case.decoded)
        say(f"{dtype}: {rate:g} samples/s need {needed:,.0f} MB/s; decoded, the loader gave up to {best:,.0f} samples/s")
    write_json(json_file, [line.as_dict() for line in lines])


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
