"""Verbs that measure: ``smoe-hpc bench ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoe_hpc.cli.figures import JsonFile, write_json
from smoe_hpc.cli.output import say, show_table
from smoe_hpc.cli.paths import user_path
from smoe_hpc.errors import RunError

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Measure speed."""


@app.command()
def loader(
    folder: Annotated[
        Path, typer.Argument(parser=user_path, help="Folder for the synthetic data, which are kept for the next time.")
    ],
    grid: Annotated[str, typer.Option(help="Rows x columns.")] = "128x256",
    days: Annotated[int, typer.Option(min=12, help="Days of 6-hourly data: 20 MB each in float32 at 128x256.")] = 120,
    dtypes: Annotated[str, typer.Option(help="Types of store: float32, float16, int16.")] = "float32,int16",
    orders: Annotated[str, typer.Option(help="Orders of samples: global, blocks.")] = "global,blocks",
    backends: Annotated[str, typer.Option(help="Backends of the loader: threads, dali.")] = "threads,dali",
    batch: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 32,
    batches: Annotated[int, typer.Option(min=4, help="Batches timed for each line.")] = 20,
    long: Annotated[int, typer.Option(min=0, help="Batches of one more line, which shows that memory does not grow.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Threads or processes of every reader.")] = 2,
    prefetch: Annotated[int, typer.Option(min=1, help="Batches read ahead.")] = 2,
    device: Annotated[str, typer.Option(help="Where batches go: cpu or cuda.")] = "cpu",
    cold: Annotated[bool, typer.Option(help="Also with nothing in the page cache.")] = True,
    baselines: Annotated[bool, typer.Option(help="Also xarray and h5py with torch's DataLoader.")] = True,
    rate: Annotated[float, typer.Option(help="Samples a second that one GPU trains on.")] = 116.0,
    json_file: JsonFile = None,
) -> None:
    """Samples a second from the store, beside bare reads of the same files and beside xarray and h5py."""
    from smoe_hpc.bench.loader.study import COLUMNS, Scope, loader_study, needed_mb_per_second
    from smoe_hpc.cli.data import parse_grid

    scope = Scope(
        folder,
        parse_grid(grid),
        days,
        dtypes=_names(dtypes),
        orders=_names(orders),
        backends=_names(backends),
        batch=batch,
        batches=batches,
        long=long,
        workers=workers,
        prefetch=prefetch,
        device=device,
        cold=cold,
        baselines=baselines,
    )
    lines = loader_study(scope, say)
    show_table("three input fields of 38 channels, three target channels", COLUMNS, [line.cells() for line in lines])
    for dtype in scope.dtypes:
        needed = needed_mb_per_second(scope, dtype, rate)
        ours = [line.outcome for line in lines if line.dtype == dtype and line.outcome.case.reader in backends.split(",")]
        best = max(outcome.samples_per_second for outcome in ours if outcome.case.decoded)
        say(f"{dtype}: {rate:g} samples/s need {needed:,.0f} MB/s; decoded, the loader gave up to {best:,.0f} samples/s")
    write_json(json_file, [line.as_dict() for line in lines])


@app.command()
def status(
    folder: Annotated[
        Path, typer.Argument(parser=user_path, help="Folder for the synthetic runs, which are kept for the next time.")
    ],
    runs: Annotated[int, typer.Option(min=1, help="How many runs.")] = 1000,
    steps: Annotated[int, typer.Option(min=50, help="Steps of each, a line of some 300 bytes a step.")] = 500,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of which the quickest counts.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Seconds of `smoe-hpc status` on many runs, beside a loop that parses their whole metrics files."""
    from smoe_hpc.bench.status import COLUMNS, status_study

    lines = status_study(folder, runs, steps, repeats, say)
    show_table(f"{runs:,} runs of {steps:,} steps", COLUMNS, [line.cells() for line in lines])
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
    baselines: Annotated[
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
    compiler_log: Annotated[Path | None, typer.Option(parser=user_path, help="File for what torch.compile says.")] = None,
    profile: Annotated[bool, typer.Option(help="Measure nothing: run the first case for a profiler (ncu, nsys).")] = False,
    json_file: JsonFile = None,
) -> None:
    """Milliseconds, share of the matrix rate and memory of the layer, beside what could take its place.

    Ctrl-C shows what was measured until then. Exit status 2 where nothing of ours could be measured.
    """
    from smoe_hpc.bench.layer import study
    from smoe_hpc.bench.layer.case import chosen_cases
    from smoe_hpc.bench.layer.profile import profile as run_profile
    from smoe_hpc.bench.layer.tables import problems, tables

    on_cpu = device.startswith("cpu")
    options: dict[str, Any] = {} if compiler_log is None else {"compiler_log": compiler_log}
    scope = study.Scope(
        chosen_cases(selection or ("cpu" if on_cpu else "quick"), case or (), _names(routing)),
        parts=_names(parts),
        baselines=study.baselines_of(
            _names(baselines or ("dense,last,published,plain" if on_cpu else ",".join(study.SHORT_NAMES)))
        ),
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
