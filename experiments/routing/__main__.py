"""The command: ``python -m experiments.routing``. Prints a Markdown table for each kind of data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.routing.study import Scope, routing_study, tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every setting of every kind of data, and print what they reached."""
    parser = argparse.ArgumentParser(prog="python -m experiments.routing", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu; cuda takes two minutes, cpu hours (default: cuda)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each setting (default: 5)")
    parser.add_argument("--runs", type=int, default=400, help="heat runs to learn from, 100 pairs each (default: 400)")
    parser.add_argument("--seeds", type=int, default=2, help="starts of each setting (default: 2)")
    parser.add_argument("--grid", type=int, nargs=2, default=(64, 64), metavar=("H", "W"), help="cells (default: 64 64)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args(arguments)
    scope = Scope(epochs=given.epochs, runs=given.runs, seeds=given.seeds, grid=tuple(given.grid))
    rows = routing_study(scope, given.device, lambda line: print(line, file=sys.stderr))
    for title, columns, cells in tables(rows):
        print(f"\n### {title}\n")
        for line in (columns, ["---"] * len(columns), *cells):
            print(f"| {' | '.join(line)} |")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
