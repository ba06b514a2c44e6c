"""What scores are, and which of them drives a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scores = dict[str, dict[str, float]]
"""{region: {score: value}}; every score has the region "all"."""

Mode = Literal["min", "max"]
"""Whether smaller or larger is better."""


@dataclass(frozen=True)
class Selection:
    """The score that drives the schedule and picks the best checkpoint.

    Attributes:
        split: that is scored, e.g. "validation".
        region: e.g. "all".
        score: its name, e.g. "within_1pct".
        mode: whether smaller or larger is better.
    """

    split: str
    region: str
    score: str
    mode: Mode
