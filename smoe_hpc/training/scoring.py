"""Scores of a model over a split, every sample exactly once whatever the number of ranks.

Dimensions: B batch.
"""

from __future__ import annotations

from smoe_hpc.config import Recipe
from smoe_hpc.io.pipeline import validation_batches
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.processes import Processes
from smoe_hpc.training.task import Scores, Task


def score(engine: Engine, task: Task, split: str, recipe: Recipe, processes: Processes) -> Scores:
    """Scores of the engine's model over a split, on every rank (collective).

    Returns:
        {region: {score: value}}.
    """
    scorer = task.score(split)
    engine.model.eval()
    batches = validation_batches(
        task.samples(split),
        batch=max(recipe.training.batch // processes.world, 1),
        rank=processes.rank,
        world=processes.world,
    )
    for host_batch in batches:
        batch = host_batch.to(processes.device, engine.dtype)
        scorer.update(engine.predict(batch.inputs), batch, batch.valid)
    engine.model.train()
    for total in scorer.state().values():
        processes.sum(total)
    return scorer.result()
