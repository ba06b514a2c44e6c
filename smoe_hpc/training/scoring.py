"""Scores of a model over a split, every sample exactly once whatever the number of ranks.

Dimensions: B batch.
"""

from __future__ import annotations

from smoe_hpc.config import Recipe
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.runs import Scores
from smoe_hpc.training.batches import open_loader
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.processes import Processes
from smoe_hpc.training.task import Task


def score(engine: Engine, task: Task, split: str, recipe: Recipe, processes: Processes, loader: Loader | None = None) -> Scores:
    """Scores of the engine's model over a split, on every rank (collective).

    Args:
        engine: the model.
        task: data and scores.
        split: "train", "validation" or "test".
        recipe: size of the batches.
        processes: the ranks.
        loader: of the split's samples, where one is open; it stays open.

    Returns:
        {region: {score: value}}.
    """
    scorer = task.score(split)
    batches = open_loader(task.samples(split), recipe, processes, engine.dtype) if loader is None else loader
    engine.model.eval()
    try:
        for batch in batches.evaluate(max(recipe.training.batch // processes.world, 1)):
            scorer.update(engine.predict(batch.inputs), batch, batch.valid)
    finally:
        if loader is None:
            batches.close()
    engine.model.train()
    for total in scorer.state().values():
        processes.sum(total)
    return scorer.result()
