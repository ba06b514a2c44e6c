"""When learning rates fall and when training ends: pure arithmetic on validation scores.

After ``patience`` validations in a row without improvement, every learning rate is multiplied by ``factor`` (all groups
together, so the ratio between gates and experts stays), and after ``early_stop`` of them training ends. An improvement
must exceed ``min_delta``. The best score itself, which picks the checkpoint, is any better one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from smoe_hpc.config import Schedule
from smoe_hpc.runs.scores import Mode


@dataclass(frozen=True)
class Plateau:
    """What the schedule remembers between validations.

    Attributes:
        reference: score that the next one must beat by ``min_delta``; None before the first validation.
        since_improvement: validations in a row that did not.
        since_reduction: of those, how many since the learning rate last fell.
        scale: what every group's learning rate is multiplied by.
        best: best score so far.
        best_step: optimiser step at which it was reached.
    """

    reference: float | None = None
    since_improvement: int = 0
    since_reduction: int = 0
    scale: float = 1.0
    best: float | None = None
    best_step: int | None = None

    def after(self, score: float, step: int, schedule: Schedule, lr: float, mode: Mode) -> Plateau:
        """State after a validation.

        Args:
            score: the selection score, finite.
            step: optimiser step at which the model was validated.
            schedule: factor, patience, floor.
            lr: learning rate of the recipe, to which ``schedule.min_lr`` is held.
            mode: whether a larger or a smaller score is better.

        >>> rule = Schedule(factor=0.1, patience=2)
        >>> state = Plateau()
        >>> for step, score in enumerate([50.0, 60.0, 60.0, 59.0]):
        ...     state = state.after(score, step, rule, lr=1e-3, mode="max")
        >>> state.scale, state.best, state.best_step
        (0.1, 60.0, 1)
        """
        sign = 1.0 if mode == "max" else -1.0
        best, best_step = (score, step) if self.best is None or sign * (score - self.best) > 0 else (self.best, self.best_step)
        if self.reference is None or sign * (score - self.reference) > schedule.min_delta:
            return replace(self, reference=score, since_improvement=0, since_reduction=0, best=best, best_step=best_step)
        flat, scale = self.since_reduction + 1, self.scale
        if flat >= max(schedule.patience, 1):
            floor = min(schedule.min_lr / lr, 1.0) if lr > 0 else 0.0
            flat, scale = 0, max(scale * schedule.factor, floor)
        return replace(
            self,
            since_improvement=self.since_improvement + 1,
            since_reduction=flat,
            scale=scale,
            best=best,
            best_step=best_step,
        )

    def stop(self, schedule: Schedule) -> bool:
        """Whether training has gone ``early_stop`` validations without improvement."""
        return schedule.early_stop is not None and self.since_improvement >= max(schedule.early_stop, 1)

    def in_words(self, step: int) -> str:
        """The best score beside the one of ``step``."""
        return "the best so far" if self.best_step == step else f"best {self.best:.6g} at step {self.best_step}"

    def reached(self, target: float | None, mode: Mode) -> bool:
        """Whether the best score so far is as good as ``target``."""
        if target is None or self.best is None:
            return False
        return self.best >= target if mode == "max" else self.best <= target
