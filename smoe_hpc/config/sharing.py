"""Whether ranks and micro-batches can share a global batch with the result of one process.

The number of ranks is known only when a run starts, so a recipe does not check these rules itself.
"""

from __future__ import annotations

import math

from smoe_hpc.config import rules
from smoe_hpc.config.model import Model
from smoe_hpc.config.recipe import Recipe
from smoe_hpc.config.training import check_batch


def check_world(recipe: Recipe, world: int) -> None:
    """Refuse ranks and accumulation that cannot share the recipe's global batch with the result of one (ConfigError)."""
    batch, accumulation = recipe.training.batch, recipe.training.accumulation
    check_batch(batch, accumulation, world)
    shared = f"{world} process{'es' if world > 1 else ''} x training.accumulation={accumulation}"
    if recipe.model.normalises:
        _check_groups(recipe.model, batch, batch // (world * accumulation), shared)
    if world * accumulation > 1 and recipe.model.kind == "smoe":
        _check_auxiliary(recipe.model, shared)


def _check_groups(model: Model, batch: int, micro: int, shared: str) -> None:
    """Groups of samples that are normalised together lie inside a micro-batch."""
    fits = math.gcd(model.ghost_batch, micro)
    rule = (
        f"must divide the micro-batch of {micro} samples (training.batch={batch} over {shared}): batch normalisation takes "
        f"its statistics over groups of samples that no process shares; set model.ghost_batch={fits} (which is another "
        "experiment), or take fewer processes or a lower accumulation"
    )
    rules.require(micro % model.ghost_batch == 0, "model.ghost_batch", model.ghost_batch, rule)


def _check_auxiliary(model: Model, shared: str) -> None:
    """Auxiliary losses do not depend on how a batch is shared; ``shared`` says how it is."""
    gate, loss = model.gate, model.routing_loss
    if loss is None or (not gate.reads_input and gate.noise != "per_sample"):
        return
    for name in ("importance", "load", "spatial_agreement"):
        key, weight = f"model.routing_loss.{name}", getattr(loss, name)
        rule = (
            "is not linear in the batch where the gate's values depend on the sample, so it would depend on how "
            f"{shared} share it; train with one process and training.accumulation=1, or set {key}=0"
        )
        rules.require(weight == 0, key, weight, rule)
