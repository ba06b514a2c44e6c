"""Verbs that write and show data: heat, convert, inspect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from smoe_hpc.cli.output import JsonFile, progress, say, write_json

app = typer.Typer(help="Write and look at data.", no_args_is_help=True)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace other data of that name.")]


@app.command()
def heat(
    out: Annotated[Path, typer.Argument(help="Folder for heat_train.h5, heat_validation.h5 and heat_test.h5.")],
    runs: Annotated[tuple[int, int, int], typer.Option(help="How many runs train, validate, test.")] = (
        1000,
        20,
        20,
    ),
    grid: Annotated[tuple[int, int], typer.Option(help="Rows and columns.")] = (64, 64),
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 100,
    seed: Annotated[int, typer.Option(help="Of regions and start values.")] = 0,
    noise: Annotated[float, typer.Option(help="Noise in the targets; 1 is as much as tells like regions apart.")] = 0.0,
    noise_ratio: Annotated[float, typer.Option(help="How many times larger it is in the western half.")] = 1.0,
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
def convert(
    source: Annotated[Path, typer.Argument(help="A GRIB file, e.g. era5-2mt-2019-03-uk.grib.")],
    store: Annotated[Path, typer.Argument(help="The HDF5 store to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Convert meteorological files into the store that training reads."""
    from smoe_hpc.io.convert import convert as convert_file

    with progress("converting fields") as report:
        convert_file(source, store, overwrite=overwrite, progress=report)
    say(f"{store}: {store.stat().st_size / 1e6:.1f} MB")


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="An HDF5 store.")],
    json_file: JsonFile = None,
) -> None:
    """Say what a store holds: grid, channels, times, constants."""
    from smoe_hpc.io.inspect import describe_store

    description = describe_store(store)
    for line in _lines(description):
        say(line)
    write_json(json_file, description)


def _lines(content: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested plain values as indented lines ``name: value``."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
