"""The first minutes: heat data, an SMoE layer and a small CNN trained on it, a table and pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from smoe_hpc.io.synthetic.heat import make_heat
from smoe_hpc.jobs.compare import Row, as_table, compare
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.text import printable

RECIPES = ("heat_quickstart", "quickstart_conv")
WIDE = 140


def run(
    out: Path,
    data: Path,
    recipes: Sequence[str] = RECIPES,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> list[Row]:
    """Make the data unless it is there, train the recipes to their end, print the table and say where pictures lie.

    Args:
        out: folder of the runs, one below it for each recipe; a run that is there is taken up or, if it ended, shown.
        data: folder of the heat data.
        recipes: heat recipes by name or file.
        overrides: further changes to all recipes.
        console: where to print; standard output if not given.

    Returns:
        A row for each recipe.

    Raises:
        SmoeError: what making the data and training raise.
    """
    console = console or _console()
    began = time.perf_counter()
    console.print(printable(f"heat data in {data} ..."), soft_wrap=True, markup=False)
    make_heat(data)
    ready = f"heat data ready ({time.perf_counter() - began:.0f} s); training {', '.join(recipes)}"
    console.print(printable(ready), soft_wrap=True, markup=False)
    rows = compare(recipes, [f"data.store={data}", f"run.root={out}", *overrides])
    console.print(as_table(rows, "within_1pct", "Heat diffusion, test split: % of points within 1 % of the truth"))
    for row in rows:
        pictures = RunDirectory(Path(row.run_dir)).pictures
        if pictures.is_dir():
            console.print(printable(f"pictures of {row.recipe}: {pictures}"), soft_wrap=True, markup=False)
    return rows


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough that no figure is cut."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    return console
