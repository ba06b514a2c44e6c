"""The training section of a recipe: how long, in which portions and how exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from smoe_hpc.config import rules


@dataclass(frozen=True)
class Training:
    """How long, in which portions and how exactly.

    Attributes:
        epochs: at most this many passes over the training split; at least 1.
        max_steps: at most this many optimiser steps, at least 1; null sets no limit.
        batch: samples per optimiser step over all processes together (the global batch); at
            least 1.
        accumulation: forward and backward passes per optimiser step, at least 1; must divide the batch of each process.
        precision: of the arithmetic: "float32", "bf16" (autocast; gates stay float32) or "float64" (for checks).
        seed: of start values, sample order and noise; not negative.
        deterministic: bit-reproducible arithmetic; null is true on a CPU and false on a GPU.
        zero_stage: ZeRO stage of the optimiser state (DeepSpeed).
        routing_refresh: optimiser steps between two refreshes of the routing, at least 1.
        routing_delay: 0, the step after a refresh uses it; 1, the one after that.
        validate_every: optimiser steps between two validations, at least 1; null validates once an epoch.
        stop_at_score: end once the validation score is this good (heat: 100.0); null never ends for it.
        threads: CPU threads of each process, at least 1; null leaves torch's choice.
    """

    epochs: int = 150
    max_steps: int | None = None
    batch: int = 32
    accumulation: int = 1
    precision: Literal["float32", "bf16", "float64"] = "float32"
    seed: int = 0
    deterministic: bool | None = None
    zero_stage: Literal[0, 1, 2] = 0
    routing_refresh: int = 1
    routing_delay: Literal[0, 1] = 0
    validate_every: int | None = None
    stop_at_score: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_training(self)


def _check_training(training: Training) -> None:
    """Counts, divisibility of the batch, and what precision allows."""
    rules.check_choices(training, "training.")
    for key, example in (
        ("epochs", 150),
        ("max_steps", 10000),
        ("batch", 32),
        ("accumulation", 1),
        ("routing_refresh", 1),
        ("validate_every", 1000),
        ("threads", 2),
    ):
        rules.check_count(f"training.{key}", getattr(training, key), example)
    rules.require(training.seed >= 0, "training.seed", training.seed, "must not be negative, e.g. training.seed=0")
    target = training.stop_at_score
    rules.require(target is None or math.isfinite(target), "training.stop_at_score", target, "must be finite, or null")
    check_batch(training.batch, training.accumulation, world=1)
    rule = "ZeRO keeps its state in float32, which would round float64; set training.zero_stage=0"
    rules.require(training.precision != "float64" or training.zero_stage == 0, "training.precision", "float64", rule)


def check_batch(batch: int, accumulation: int, world: int) -> None:
    """The global batch falls into equal portions, one per rank and accumulation step."""
    portions = accumulation * world
    below, above = batch // portions * portions, (batch // portions + 1) * portions
    parts = (f"{world} ranks x " if world > 1 else "") + f"training.accumulation={accumulation}"
    fits = f"{below} or {above}" if below else f"{above}"
    rule = f"must be a multiple of {portions} ({parts}); set training.batch={fits}"
    rules.require(batch % portions == 0, "training.batch", batch, rule)
