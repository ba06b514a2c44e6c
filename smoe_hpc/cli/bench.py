"""Verbs that measure: ``smoe-hpc bench ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoe_hpc.cli.output import JsonFile, say, show_table, write_json
from smoe_hpc.errors import RunError

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


@app.command()
def layer(
    selection: Annotated[str, typer.Option(help="quick, full or cpu; see --case and --limit.")] = "",
    case: Annotated[
        list[str] | None, typer.Option(help="In place of a selection: sizes, e.g. 'B8 C128 128x256 N1024 K128 F1'; repeatable.")
    ] = None,
    routing: Annotated[str, typer.Option(help="smooth, random, learned; by default as selected, smooth for --case.")] = "",
    parts: Annotated[str, typer.Option(help="forward, backward (both passes), step (with routing loss and damping).")] = (
        "forward,backward,step"
    ),
    rivals: Annotated[
        str, typer.Option(help="none, or of dense,compiled,last,last-compiled,published,plain; by default all, eager on a CPU.")
    ] = "",
    deterministic: Annotated[str, typer.Option(help="Mode of our kernels: on, off or both.")] = "both",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; float32 on a CPU.")] = "",
    padding: Annotated[str, typer.Option(help="zeros, periodic_longitude or sphere.")] = "zeros",
    repeats: Annotated[int, typer.Option(min=5, help="Calls that a median is taken over, at most.")] = 50,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long one measurement may take.")] = 0.1,
    cold: Annotated[bool, typer.Option(help="Empty the GPU's cache before each call.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a CPU.")] = 2,
    training_steps: Annotated[int, typer.Option(min=0, help="Steps that the gate of learned routing has trained.")] = 200,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds after which nothing more is measured.")] = float("inf"),
    compiler_log: Annotated[Path | None, typer.Option(help="File for what torch.compile says.")] = None,
    profile: Annotated[bool, typer.Option(help="Measure nothing: run the first case for a profiler (ncu, nsys).")] = False,
    json_file: JsonFile = None,
) -> None:
    """Milliseconds, share of the matrix rate and memory of the layer, beside what could take its place.

    Ctrl-C shows what was measured until then. Exit status 2 where nothing of ours could be measured.
    """
    from smoe_hpc.bench import layer as study
    from smoe_hpc.bench.layer_case import chosen_cases
    from smoe_hpc.bench.layer_profile import profile as run_profile
    from smoe_hpc.bench.layer_tables import problems, tables

    on_cpu = device.startswith("cpu")
    options: dict[str, Any] = {} if compiler_log is None else {"compiler_log": compiler_log}
    scope = study.Scope(
        chosen_cases(selection or ("cpu" if on_cpu else "quick"), case or (), _names(routing)),
        parts=_names(parts),
        rivals=study.rivals_of(_names(rivals or ("dense,last,published,plain" if on_cpu else ",".join(study.SHORT_NAMES)))),
        modes=study.modes_of(deterministic),
        device=device,
        dtype=dtype or ("float32" if on_cpu else "bfloat16"),
        padding=padding,
        repeats=repeats,
        seconds=seconds,
        cold=cold,
        threads=threads,
        training_steps=training_steps,
        limit=limit,
        **options,
    )
    if profile:
        run_profile(scope, say)
        return
    kept: list[study.Study] = []

    def keep(so_far: study.Study) -> None:
        kept[:] = [so_far]
        write_json(json_file, so_far.as_dict())

    try:
        study.layer_study(scope, say, keep)
    finally:  # also where it ends early: what was measured took its time
        for found in kept:
            for title, columns, cells in tables(found):
                show_table(title, columns, cells)
            for problem in problems(found):
                say(problem)
    if not any(line.timing is not None and line.way.startswith(study.OURS) for found in kept for line in found.lines):
        raise RunError("none of our kernels could be measured, see above; choose other cases or a longer --limit")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
