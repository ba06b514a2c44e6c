"""Trains the toy task in many ways inside one set of processes: ``matrix.py FOLDER CASES.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from smoe_hpc.training import train
from tests.training.toy import ToyTask, recipe


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, (kind, changes) in cases.items():
        train(recipe(**changes), ToyTask(kind), run_dir=folder / name, progress=False)


if __name__ == "__main__":
    main()
