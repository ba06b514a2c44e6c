"""Which commands make the data of a recipe, for the error where there are none."""

from __future__ import annotations

import glob
import os
import shlex
from pathlib import Path

from smoe_hpc.config.recipe import Recipe
from smoe_hpc.errors import DataError

TRIAL = "data/synthetic"  # where synthetic weather goes: not where ERA5 is expected


def require_data(recipe: Recipe) -> None:
    """Refuse a recipe without data at its data.store; nothing is opened.

    Raises:
        DataError: nothing is there; it names the commands that make the data.
    """
    store = recipe.data.store
    if not (os.path.exists(store) or glob.glob(store)):
        raise DataError(f"no data at {Path(store).absolute()}: set data.store to yours, or make some: {how_to_make(recipe)}")


def how_to_make(recipe: Recipe) -> str:
    """The commands that make data for a recipe: at its data.store, or elsewhere if they are not of its kind (weather)."""
    store = recipe.data.store
    if recipe.task == "heat":
        return f"`{heat_command(recipe)}`"
    if recipe.task == "regional":
        target = store if store.endswith(".h5") and not glob.has_magic(store) else f"{_folder(store)}/NAME.h5"
        return (
            f"`smoe-hpc data convert FILE.grib {shlex.quote(target)}` takes GRIB of surface fields on a regular latitude-"
            "longitude grid (docs/regional.md names such a file)"
        )
    return (
        f"`smoe-hpc data synthesize {TRIAL} --grid 16x32 --days 90` makes up weather to try it with (then data.store={TRIAL} "
        f"and the changes that `smoe-hpc data splits {TRIAL}` prints); docs/weather.md says how ERA5 is written into a store"
    )


def heat_command(recipe: Recipe, overwrite: bool = False) -> str:
    """The command that writes the heat data of a recipe, with its noise."""
    data = recipe.data
    words = ["smoe-hpc", "data", "heat", data.store]
    if data.noise:
        words += ["--noise", f"{data.noise:g}", "--noise-ratio", f"{data.noise_ratio:g}"]
    return shlex.join([*words, "--overwrite"] if overwrite else words)


def _folder(store: str) -> str:
    """The folder that a store's path or pattern names, or lies in."""
    return os.path.dirname(store) or "." if glob.has_magic(store) else store
