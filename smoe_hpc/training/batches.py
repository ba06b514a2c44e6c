"""Loaders of a run's samples as its recipe configures them, and errors that name bad data.

Dimensions: B samples of a micro-batch of one rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.config import Recipe
from smoe_hpc.errors import DataError, RunError
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.runs import Scores
from smoe_hpc.training.processes import Processes
from smoe_hpc.training.task import Task

REMEDY = (
    "mend them or leave that time out of the split (`smoe-hpc data verify` lists all such values), and train under another name"
)


def open_loader(samples: Any, recipe: Recipe, processes: Processes, dtype: torch.dtype) -> Loader:
    """A loader of this rank's batches on its device; the caller closes it.

    Raises:
        DataError: a backend that is not installed.
    """
    settings = recipe.loader
    return Loader(
        samples,
        backend=settings.backend,
        workers=settings.workers,
        prefetch=settings.prefetch,
        verify=settings.verify,
        device=processes.device,
        rank=processes.rank,
        world=processes.world,
        dtype=dtype,
    )


class Loaders:
    """Loaders of a task's splits, each opened at first use and kept.

    Args:
        task: whose samples.
        recipe: how they are read.
        processes: the ranks.
        dtype: of the batches.
    """

    def __init__(self, task: Task, recipe: Recipe, processes: Processes, dtype: torch.dtype) -> None:
        self._task, self._recipe, self._processes, self._dtype = task, recipe, processes, dtype
        self._open: dict[str, Loader] = {}

    def of(self, split: str) -> Loader:
        """The loader of a split."""
        if split not in self._open:
            self._open[split] = open_loader(self._task.samples(split), self._recipe, self._processes, self._dtype)
        return self._open[split]

    def close(self) -> None:
        """Close them all; one that is used later is opened again."""
        while self._open:
            self._open.popitem()[1].close()


def sample_positions(recipe: Recipe, processes: Processes) -> list[Tensor]:
    """Indices within the global batch of each micro-batch of this rank: [B] int64 each."""
    training = recipe.training
    share = training.batch // processes.world
    first = processes.rank * share
    own = torch.arange(first, first + share, device=processes.device)
    return list(own.split(share // training.accumulation))


def what_is_not_finite(samples: Any, recipe: Recipe, epoch: int, step_in_epoch: int) -> str | None:
    """Name a stored value that is not finite in the global batch of a step; None if there is none.

    The order of samples is a pure function, so every rank finds the same.
    """
    if not isinstance(samples, Samples):
        return None
    first = step_in_epoch * recipe.training.batch
    return _not_finite(samples, samples.epoch_ids(recipe.training.seed, epoch)[first : first + recipe.training.batch])


def what_is_not_finite_in_split(samples: Any) -> str | None:
    """Name a stored value of a whole split that is not finite; None if there is none, or nothing is stored."""
    return _not_finite(samples, samples.all_ids()) if isinstance(samples, Samples) else None


def _not_finite(samples: Samples, items: np.ndarray) -> str | None:
    try:
        return samples.find_not_finite(items)
    except DataError as error:  # the data went bad in between: that says it too
        return str(error)


def remedy_of_divergence(kept: list[int], in_data: str | None, which: str) -> str:
    """What an error about a loss or score that is not finite says about the way on.

    Args:
        kept: steps that have a checkpoint.
        in_data: the stored value that is not finite, if one was found.
        which: the data that were searched, e.g. "the test data".
    """
    last = f"checkpoint step_{kept[-1]} is from before" if kept else "nothing was saved"
    if in_data is not None:
        return f"{last}; {which} are at fault: {in_data}; {REMEDY}"
    advice = "lower optimizer.lr or set optimizer.clip, look for non-finite values in the data, and train under another name"
    return f"{last}; {advice}"


def require_finite(scores: Scores, samples: Any, split: str) -> None:
    """Check that scores are finite. Every rank has the same ones, so all of them raise or none.

    Raises:
        RunError: a score is not finite; it names the value in the split's data that is not, if there is one.
    """
    for region, values in scores.items():
        for name, value in values.items():
            if math.isfinite(value):
                continue
            what = f"{name} ({region}) on {split} is {value}"
            found = what_is_not_finite_in_split(samples)
            if found is not None:
                raise RunError(f"{what}: the {split} data are at fault: {found}; {REMEDY}")
            data = f"the {split} data are finite, so " if isinstance(samples, Samples) else ""
            raise RunError(
                f"{what}: {data}the model has diverged, or nothing was there to be scored; lower optimizer.lr or set "
                "optimizer.clip, and train under another name"
            )
