"""Where a run stands: one frozen value that determines what is still to be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from smoe_hpc.runs.schedule import Plateau


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
        """The way back. TypeError or ValueError where the values are none of a position."""
        return Position(**{**values, "plateau": Plateau(**values["plateau"])}).checked()

    def checked(self) -> Position:
        """Itself; ValueError if a value is of the wrong type."""
        plateau = self.plateau
        counts = (self.step, self.epoch, self.in_epoch, plateau.since_improvement, plateau.since_reduction)
        if not all(map(is_count, counts)) or not (plateau.best_step is None or is_count(plateau.best_step)):
            raise ValueError("steps and epochs are not whole numbers of at least 0")
        numbers = (self.loss_sum, plateau.scale, plateau.reference, plateau.best)
        if not all(value is None or isinstance(value, (int, float)) for value in numbers) or type(self.settled) is not bool:
            raise ValueError("scores are no numbers")
        return self


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
