"""What the training loop needs of a task; tasks live above this room and are not imported here.

Dimensions: B batch, C input channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from smoe_hpc.runs import Scores, Selection
from smoe_hpc.runs.description import Description

Draw = Callable[[Path, nn.Module], object]
"""Draws the pictures of a run into its folder: (folder, the model of the best checkpoint)."""


class Scorer(Protocol):
    """Accumulates scores over a split."""

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
        """The score that drives the schedule and picks the best checkpoint."""

    def build_model(self) -> nn.Module:
        """A new model [B, C, H, W] -> [B, targets, H, W], the same on every rank."""

    def samples(self, split: str) -> Any:
        """Samples of a split: ``len()`` and ``fetch(ids) -> batch``."""

    def describe(self) -> tuple[Description, dict[str, torch.Tensor]] | None:
        """What the model takes and gives, and the fixed fields that it reads; None of data that live in memory alone.

        Recipe, grid, channels and leads are set; step and files are for whoever writes it down.
        """

    def loss(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        """Mean loss over the batch, 0-d."""

    def score(self, split: str) -> Scorer:
        """A new scorer for a split."""
