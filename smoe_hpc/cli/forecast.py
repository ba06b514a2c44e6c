"""The verb that forecasts with a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoe_hpc.cli.arguments import RunFolder
from smoe_hpc.cli.output import progress, say
from smoe_hpc.cli.paths import user_path
from smoe_hpc.errors import ConfigError


def forecast(
    run: RunFolder,
    data: Annotated[Path, typer.Option(parser=user_path, metavar="STORE", help="A store, a folder of stores, or a pattern.")],
    out: Annotated[Path, typer.Option(parser=user_path, metavar="FILE", help="A new file, .nc (netCDF) or .zarr.")],
    start: Annotated[
        str | None, typer.Option(help="First start, e.g. 2017-01-01T00 (heat: RUN:STEP); all that the data have if not given.")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Last start; only --start if not given.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Hours between starts.")] = 24,
    lead: Annotated[
        list[int] | None, typer.Option(help="Hours ahead, for a model of continuous lead; may be given several times.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Starts computed at once; the recipe's batch if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the first GPU, or else the CPU.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE, once the new one is whole.")] = False,
) -> None:
    """Forecast with a trained run, into a file of physical values that xarray and WeatherBench 2 read.

    The run's folder is enough: neither its training data nor the truth of the forecasts is needed.
    """
    from smoe_hpc.inference import load_run, writing

    writing.check_output(out, overwrite)
    model = load_run(run, device)
    starts = _starts(start, end, every, model.description.axis)
    pieces = model.forecasts(data, starts, leads=lead, batch=batch)
    with progress("forecasts") as report:
        count = writing.write_forecasts(out, pieces, overwrite=overwrite, done=lambda done: report(done, max(done, 1)))
    say(f"{out}: {count:,} forecast{'s' if count != 1 else ''} of step {model.description.step} of {model.recipe.name}")


def _starts(start: str | None, end: str | None, every: int, axis: str) -> Any:
    """What `TrainedModel.forecasts` takes."""
    import numpy as np

    if start is None:
        if end is not None:
            raise ConfigError("--end without --start: give both, or neither for all starts of the data")
        return None
    if axis == "run":
        if end is not None:
            raise ConfigError("--end: this run forecasts steps of runs; give one --start RUN:STEP, or none for all")
        return [tuple(start.split(":"))]
    try:
        first = np.datetime64(start, "s")
        last = first if end is None else np.datetime64(end, "s")
    except ValueError as error:
        raise ConfigError(f"--start {start}{'' if end is None else f' --end {end}'}: {error}; give 2017-01-01T00") from None
    if np.isnat(first) or np.isnat(last) or last < first:
        raise ConfigError(f"--start {start} --end {end}: give two times, the later one at the end")
    return list(np.arange(first, last + np.timedelta64(1, "s"), np.timedelta64(every, "h")))
