"""The sections of a recipe that say how parameters move: optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from smoe_hpc.config import rules


@dataclass(frozen=True)
class Optimizer:
    """How parameters move.

    Attributes:
        kind: "adam" (coupled weight decay, as torch.optim.Adam) or "sgd" (its momentum is the first of ``optimizer.betas``).
        lr: learning rate of experts, kernels and biases, above 0.
        betas: Adam's decay rates of the first and second moment, both from 0 to below 1.
        eps: Adam's eps, above 0 (gates have their own, 1e-15: their gradients are tiny).
        weight_decay: of experts and kernels only; not negative.
        gate_lr: learning rate of gates, not negative; null takes ``optimizer.lr``. Gates want a larger one where
            targets are noisy.
        clip: largest norm of the gradient, above 0 (gates not counted); null does not clip.
    """

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    gate_lr: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_optimizer(self)


def _check_optimizer(optimizer: Optimizer) -> None:
    """Rates above 0, decay rates below 1."""
    rules.check_choices(optimizer, "optimizer.")
    rules.check_positive("optimizer.lr", optimizer.lr, 1e-3)
    if optimizer.gate_lr is not None:
        rules.check_not_negative("optimizer.gate_lr", optimizer.gate_lr)
    whole = len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas)
    rules.require(whole, "optimizer.betas", optimizer.betas, "must be two numbers in 0 to below 1, e.g. [0.9,0.999]")
    rules.check_positive("optimizer.eps", optimizer.eps, 1e-8)
    rules.check_not_negative("optimizer.weight_decay", optimizer.weight_decay)
    rules.check_positive("optimizer.clip", optimizer.clip, 1.0)


@dataclass(frozen=True)
class Schedule:
    """When learning rates fall and when training ends, both by the validation score (paper, section on training).

    Attributes:
        factor: what learning rates are multiplied by on a plateau, above 0, at most 1; 1 never changes them.
        patience: validations without improvement that a plateau is made of; not negative.
        min_lr: no learning rate falls below this; not negative, at most ``optimizer.lr``.
        early_stop: validations without improvement after which training ends, at least 1; null never ends it.
        min_delta: a smaller change of the score is no improvement; in the score's unit, not negative.
    """

    factor: float = 0.1
    patience: int = 15
    min_lr: float = 0.0
    early_stop: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self)


def _check_schedule(schedule: Schedule) -> None:
    """Plateau and early stop."""
    rule = "must lie above 0 and at most at 1, e.g. 0.1; 1 keeps the learning rates"
    rules.require(0 < schedule.factor <= 1, "schedule.factor", schedule.factor, rule)
    rules.require(schedule.patience >= 0, "schedule.patience", schedule.patience, "must not be negative, e.g. 15")
    rules.check_not_negative("schedule.min_lr", schedule.min_lr)
    rules.check_not_negative("schedule.min_delta", schedule.min_delta)
    rules.check_count("schedule.early_stop", schedule.early_stop, 30)
