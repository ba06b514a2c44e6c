"""How long ``smoe-hpc status`` takes on a folder of many runs, beside a loop that parses every metrics.jsonl whole.

The runs are made up: a lock, a metrics.jsonl as training writes it, and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smoe_hpc.errors import RunError
from smoe_hpc.runs import layout, standings

COLUMNS = ("what", "seconds", "of a processor", "runs/s")


@dataclass(frozen=True)
class Line:
    """A way to learn where the runs stand.

    Attributes:
        what: the way.
        seconds: the quickest of the repeats.
        processor: the least seconds of a processor, which others on the machine hardly change.
        runs: how many runs it looked at.
    """

    what: str
    seconds: float
    processor: float
    runs: int

    def cells(self) -> list[str]:
        """As a row of a table under COLUMNS."""
        return [self.what, f"{self.seconds:.3f}", f"{self.processor:.3f}", f"{self.runs / self.seconds:,.0f}"]

    def as_dict(self) -> dict[str, Any]:
        """As values for a JSON file."""
        return asdict(self)


def make_runs(root: Path, runs: int, steps: int) -> None:
    """Runs of ``steps`` steps with a validation every 50; those that are there stay.

    Raises:
        RunError: the folder cannot be written.
    """
    lr = {"experts": 1e-3, "gates": 1e-3, "kernels": 1e-3}
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        routing = {f"layer{n}.{name}": 0.123456789 for n in range(2) for name in ("entropy", "selections_changed")}
        lines.append({"event": "step", "step": step, "epoch": 0, "loss": 1 / step, **routing, "lr": lr})
        if step % 50 == 0:
            scores = {region: {"loss": 1.5, "rmse": 1.25, "within_1pct": 80.0} for region in ("all", "north", "south")}
            best = {"score": "rmse", "value": 1.2, "step": step}
            about = {"event": "validation", "step": step, "epoch": 0, "split": "validation"}
            lines.append({**about, "scores": scores, "best": best, "lr": lr})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        for number in range(runs):
            run = root / f"run_{number:05d}"
            if not (run / layout.METRICS).exists():
                run.mkdir(parents=True, exist_ok=True)
                (run / layout.LOCK).write_text(f"process {number} on host\n")
                (run / layout.METRICS).write_text(text)
    except OSError as error:
        raise RunError(f"{root}: runs cannot be made there ({error.strerror}); name another folder") from None


def parse_whole(root: Path) -> list[dict[str, Any]]:
    """What one writes without this package: each file parsed from its beginning, the last event of each kind kept."""
    rows = []
    for path in sorted(root.glob(f"*/{layout.METRICS}")):
        row: dict[str, Any] = {}
        for line in path.read_text().splitlines():
            event = json.loads(line)
            row["step"] = event["step"]
            if event["event"] == "validation":
                row["rmse"] = event["scores"]["all"]["rmse"]
        rows.append(row)
    return rows


def status_study(root: Path, runs: int, steps: int, repeats: int, say: Callable[[str], None]) -> list[Line]:
    """Seconds of the command, of what it does inside, and of the loop.

    Args:
        root: where the runs are made; they stay.
        runs: how many.
        steps: of each.
        repeats: of each way; the quickest counts.
        say: called with a line about progress.

    Raises:
        RunError: the folder cannot be written, or the command fails.
    """
    say(f"{runs:,} runs of {steps:,} steps in {root} ...")
    make_runs(root, runs, steps)
    there = len(standings(root, lambda jobs: {}))
    ways: dict[str, Callable[[], object]] = {
        "smoe-hpc status, a process of its own": lambda: _command(root),
        "reading the folders": lambda: standings(root, lambda jobs: {}),
        "each metrics.jsonl parsed whole": lambda: parse_whole(root),
    }
    return [Line(what, *_quickest(way, repeats), there) for what, way in ways.items()]


def _command(root: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "smoe_hpc", "status", str(root)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"smoe-hpc status {root} ended with status {done.returncode}: {done.stderr.strip()}")


def _quickest(way: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least seconds of several calls, and least seconds of a processor, children included."""
    taken, used = [], []
    for _ in range(repeats):
        began, before = time.perf_counter(), _used()
        way()
        taken.append(time.perf_counter() - began)
        used.append(_used() - before)
    return min(taken), min(used)


def _used() -> float:
    return sum(os.times()[:4])
