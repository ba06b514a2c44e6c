"""Where a run stands: one frozen value, from which everything that is still to be done follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from smoe_hpc.training.checkpoint import Saved
from smoe_hpc.training.schedule import Plateau


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        epoch: epochs finished.
        in_epoch: steps done in the epoch that is under way.
        settled: whether all that follows the last step (validation, schedule) has been done too.
        loss_sum: sum of the losses of the epoch's steps.
        plateau: schedule and best score.
    """

    step: int = 0
    epoch: int = 0
    in_epoch: int = 0
    settled: bool = True
    loss_sum: float = 0.0
    plateau: Plateau = field(default_factory=Plateau)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Position:
        """The way back."""
        return Position(**{**values, "plateau": Plateau(**values["plateau"])})


def resume_state(saved: Saved | None) -> tuple[Position, dict[str, int]]:
    """Position and sizes of the log files of a checkpoint; the beginning for None."""
    if saved is None:
        return Position(), {}
    return Position.from_dict(saved.state["position"]), saved.state["log"]
