"""All lines of a run's metrics.jsonl, for pictures of them (`reading` has the newest alone)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from smoe_hpc.errors import RunError
from smoe_hpc.files.regular import open_regular

Events = dict[str, list[dict[str, Any]]]
"""Lines by their event: "step", "epoch", "validation"."""


def read_events(path: Path) -> Events:
    """Lines of a metrics.jsonl by their event; a last line that is still being written is left out.

    Raises:
        RunError: the file is missing or is something else.
    """
    events: Events = {"step": [], "epoch": [], "validation": []}
    number = 0
    try:
        with os.fdopen(open_regular(path), encoding="utf-8") as file:
            lines = file.read().split("\n")[:-1]  # what follows the last line break is not whole
        for line in lines:
            number += 1
            event = json.loads(line)
            _check(event)
            events.setdefault(event["event"], []).append(event)
    except (OSError, ValueError, RecursionError) as error:
        where = f"line {number}: " if number else ""
        raise RunError(f"{path} cannot be read as metrics ({where}{error}); give the folder of a run") from error
    return events


def _check(event: Any) -> None:
    """ValueError unless it is what training writes, as far as pictures need it."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("it is no event of a run")
    figures = [event.get(name) for name in ("loss", "selections_changed")]
    if event["event"] == "validation":
        regions = event.get("scores")
        if not isinstance(regions, dict) or not all(isinstance(scores, dict) for scores in regions.values()):
            raise ValueError("it has no scores")
        figures += [value for scores in regions.values() for value in scores.values()]
    if not isinstance(event.get("step"), int) or not all(one is None or isinstance(one, (int, float)) for one in figures):
        raise ValueError("a step or a figure is no number")
