"""What the training loop asks of a task; tasks live above this room and are not imported here.

Dimensions: B batch, C input channels, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

Scores = dict[str, dict[str, float]]
"""{region: {score: value}}, with the region "all" among them."""


class Selection(Protocol):
    """The score that drives the schedule and picks the best checkpoint."""

    @property
    def split(self) -> str:
        """Split that is scored, e.g. "validation"."""

    @property
    def region(self) -> str:
        """Region, e.g. "all"."""

    @property
    def score(self) -> str:
        """Name of the score, e.g. "within_1pct"."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether smaller or larger is better."""


class Scorer(Protocol):
    """Sums up scores over a split."""

    def update(self, output: torch.Tensor, batch: Any, valid: torch.Tensor) -> None:
        """Add a batch; ``valid`` [B] is False for samples that only fill the batch up."""

    def state(self) -> dict[str, torch.Tensor]:
        """The float64 sums so far, by reference: the loop replaces them by their sums over ranks."""

    def result(self) -> Scores:
        """Scores of everything added."""


class Task(Protocol):
    """Which data, which model, which loss, which scores."""

    @property
    def grid(self) -> Any:
        """Grid of inputs and outputs."""

    @property
    def selection(self) -> Selection:
        """See `Selection`."""

    def build_model(self) -> nn.Module:
        """A new model [B, C, H, W] -> [B, targets, H, W], the same on every rank."""

    def samples(self, split: str) -> Any:
        """Samples of a split: ``len()`` and ``fetch(ids) -> batch``."""

    def loss(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        """Mean loss over the batch, 0-d."""

    def score(self, split: str) -> Scorer:
        """A new scorer for a split."""

    def pictures(self, run_dir: Path, model: nn.Module) -> None:
        """Draw the run's pictures into its directory."""
