"""Verbs that write, check and show data: heat, synthesize, statistics, convert, inspect, verify, splits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoe_hpc.cli.arguments import Overrides, RecipeName
from smoe_hpc.cli.data_jobs import data_job
from smoe_hpc.cli.figures import JsonFile, write_json
from smoe_hpc.cli.output import progress, say, show_table
from smoe_hpc.cli.paths import user_path
from smoe_hpc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from smoe_hpc.io.checks.verify import Report

app = typer.Typer(help="Write, check and show data.", no_args_is_help=True)
_SHOWN = 20

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace other data of that name.")]


@app.command()
def heat(
    out: Annotated[
        Path, typer.Argument(parser=user_path, help="Folder for heat_train.h5, heat_validation.h5 and heat_test.h5.")
    ],
    runs: Annotated[tuple[int, int, int], typer.Option(help="Number of runs for training, validation and test.")] = (
        1000,
        20,
        20,
    ),
    grid: Annotated[tuple[int, int], typer.Option(help="Rows and columns.")] = (64, 64),
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed of regions and start values.")] = 0,
    noise: Annotated[
        float, typer.Option(help="Noise in the targets; 1 is the difference between the most similar regions.")
    ] = 0.0,
    noise_ratio: Annotated[float, typer.Option(help="How many times larger the noise is in the western half.")] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Simulate location-dependent heat diffusion (three hidden regions) into HDF5 stores."""
    from smoe_hpc.io.synthetic.heat import make_heat

    noisy = {"noise": noise, "noise_ratio": noise_ratio}
    with progress("simulating runs") as report:
        paths = make_heat(out, runs, grid, steps=steps, seed=seed, **noisy, overwrite=overwrite, progress=report)
    for path in paths.values():
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command()
def synthesize(
    out: Annotated[Path, typer.Argument(parser=user_path, help="Folder for synthetic_<year>.h5 and index.json.")],
    grid: Annotated[str, typer.Option(help="Rows x columns over the whole Earth.")] = "128x256",
    years: Annotated[
        float, typer.Option(help="Number of years, from January of --start; a fraction of a year is its first days.")
    ] = 2,
    step: Annotated[int, typer.Option(help="Hours between samples.")] = 6,
    channels: Annotated[str, typer.Option(help="Which set of channels.")] = "rt38",
    start: Annotated[int, typer.Option(help="First year.")] = 2015,
    days: Annotated[int | None, typer.Option(help="Number of days, instead of years.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of weather and continents.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or int16.")] = "float32",
    compression: Annotated[str | None, typer.Option(help="gzip, zstd, lz4 or blosc; smaller, and slower to read.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make SYNTHETIC weather-like fields of the ERA5 channels; processes of mpirun or srun share the years."""
    shape = parse_grid(grid)
    options: dict[str, Any] = {"channels": channels, "start": start, "days": days, "seed": seed, "overwrite": overwrite}
    stored: dict[str, Any] = {"dtype": dtype, "compression": compression}
    with data_job("synthesizing samples") as (communicator, report):
        from smoe_hpc.io.synthetic.era5 import NOTICE, synthesize

        made = synthesize(out, shape, years, step, **options, **stored, communicator=communicator, progress=report)
    say(f"{NOTICE}.")
    for path in made.paths:
        how = "written" if path in made.written else "was there already"
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {how}")


def parse_grid(text: str) -> tuple[int, int]:
    """(rows, columns) of a text such as 128x256. ConfigError for any other."""
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise ConfigError(f"--grid {text}: give rows and columns, as in 128x256")
    return int(rows), int(columns)


@app.command()
def statistics(recipe: RecipeName, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Compute statistics and climatology of a weather recipe's training split, once for all runs.

    Processes of mpirun or srun share the work."""
    from smoe_hpc.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with data_job("going over fields") as (communicator, report):
        from smoe_hpc.tasks import prepare_data

        found, _ = prepare_data(loaded, communicator, report)
    rows = zip(found.channels, found.mean, found.std, strict=True)
    figures = {name: {"mean": mean, "std": std} for name, mean, std in rows}
    for name, of_channel in figures.items():
        say(f"{name:>6}  mean {of_channel['mean']:.6g}  std {of_channel['std']:.6g}")
    say(f"statistics of {found.count:,} values a channel and climatology of {loaded.data.store}, {found.split}: kept")
    write_json(json_file, {"channels": figures, "count": found.count, "split": found.split})


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(parser=user_path, help="A GRIB file, e.g. era5-2mt-2019-03-uk.grib.")],
    store: Annotated[Path, typer.Argument(parser=user_path, help="The HDF5 store to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Convert meteorological files into the store that training reads."""
    from smoe_hpc.io.convert import convert as convert_file

    with progress("converting fields") as report:
        convert_file(source, store, overwrite=overwrite, progress=report)
    say(f"{store}: {store.stat().st_size / 1e6:.1f} MB")


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(parser=user_path, help="A store file, a folder of them or a quoted pattern.")],
    json_file: JsonFile = None,
) -> None:
    """Show what a store holds: grid, channels, times, gaps, encoding; reads no field."""
    from smoe_hpc.io.checks.inspect import describe_store

    description = describe_store(store)
    for line in _lines(description):
        say(line)
    write_json(json_file, description)


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(parser=user_path, help="A store file, a folder of them or a quoted pattern.")],
    index: Annotated[bool, typer.Option("--index", help="Afterwards rewrite the folder's index.json.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Read all data and report every damaged sample, NaN, gap and changed file.

    Processes of mpirun or srun share the work. Exit status 1 if something is damaged or unreadable.
    """
    from smoe_hpc.io.checks.verify import verify as look
    from smoe_hpc.io.store.index_writing import write_index
    from smoe_hpc.launch.communicator import find_communicator

    if index and not store.is_dir():
        raise ConfigError(f"--index: {store} is not a folder; an index belongs to a folder of stores")
    with find_communicator() as communicator:
        with progress("verifying samples") if communicator.rank == 0 else nullcontext() as report_progress:
            report = look(store, communicator, report_progress)
        sound = report.ok or (index and not (report.unusable or report.damaged or report.not_finite or report.unread))
        if index and sound:
            write_index(store, communicator)
    _show_verification(report, written=index and sound)
    write_json(json_file, report.as_dict())
    if not sound and communicator.rank == 0:  # a launcher may end the others as soon as one fails, and one tells what is wrong
        raise typer.Exit(1)


def _show_verification(report: Report, written: bool) -> None:
    if report.synthetic:
        say("SYNTHETIC: these fields were made up, they are not observations.")
    say(f"{report.path}: {report.samples} samples, files: {report.files}, {report.bytes / 1e6:,.1f} MB")
    problems = report.problems()
    for problem in problems[:_SHOWN]:
        say(f"BAD: {problem}")
    if len(problems) > _SHOWN:
        say(f"BAD: {len(problems) - _SHOWN} more (--json FILE has all)")
    for fault in report.unread[:_SHOWN]:
        say(f"NOT READ: {fault}")
    if len(report.unread) > _SHOWN:
        say(f"NOT READ: {len(report.unread) - _SHOWN} more (--json FILE has all)")
    for gap in report.gaps[:_SHOWN]:
        say(str(gap))
    if len(report.gaps) > _SHOWN:
        say(f"gap: {len(report.gaps) - _SHOWN} more (--json FILE has all)")
    for name in report.unchecked[:_SHOWN]:
        say(f"{name} has no checksums: damage cannot be seen there; smoe_hpc.io.StoreWriter writes them")
    if report.quantisation:
        rows = [[n, f"{q.rms:.2g}", q.units, f"{100 * q.share_of_std:.2g} %"] for n, q in report.quantisation.items()]
        show_table("error of rounding (rms)", ["channel", "error", "units", "of the std"], rows)
    if report.ok:
        say("every sample is whole")
    if written:
        say(f"{report.path}: index written")


@app.command()
def splits(
    store: Annotated[Path, typer.Argument(parser=user_path, help="An HDF5 store, or a folder of stores.")],
    validation: Annotated[float, typer.Option(help="Share of the days for validation.")] = 0.15,
    test: Annotated[float, typer.Option(help="Share of the days for the test; training takes the rest.")] = 0.15,
) -> None:
    """Print overrides that split a store's days, for data of other years than the recipe's."""
    from smoe_hpc.io import open_store
    from smoe_hpc.io.sampling.proportions import proportional_splits

    with open_store(store) as opened:
        if "time" not in opened.coords:
            raise DataError(f"{store} has no times but {', '.join(opened.coords)}; split it by hand, see data.splits")
        times = opened.coords["time"]
        for name, days in proportional_splits(times[0], times[-1], (validation, test)).items():
            say(f"data.splits.{name}={days}")


def _lines(content: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested mappings as indented lines ``name: value``."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
