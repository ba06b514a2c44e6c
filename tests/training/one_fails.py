"""Trains on a store, damaged for one rank: ``one_fails.py RUN_DIR STORE DAMAGED RANK``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from smoe_hpc.errors import SmoeError
from smoe_hpc.training import train
from tests.training import toy
from tests.training.test_batches import StoredTask


def main() -> int:
    run_dir, whole, damaged, rank = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    task = StoredTask(damaged if os.environ["RANK"] == rank else whole)
    try:
        train(toy.recipe(loader__verify="all"), task, run_dir=run_dir, progress=False)
    except SmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
