"""Trains every recipe of a folder in one set of processes: ``train_all.py RECIPES RUNS``."""

from __future__ import annotations

import sys
from pathlib import Path

from smoe_hpc.config import load_recipe
from smoe_hpc.tasks import make_task
from smoe_hpc.training import train


def main() -> None:
    recipes, runs = (Path(argument) for argument in sys.argv[1:])
    for path in sorted(recipes.glob("*.yaml")):
        recipe = load_recipe(path)
        train(recipe, make_task(recipe), run_dir=runs / path.stem, progress=False)


if __name__ == "__main__":
    main()
