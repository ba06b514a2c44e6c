"""A run's task on other data than it was trained on: the same channels and scaling, other times."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import numpy as np

from smoe_hpc.config import Recipe
from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.io.sampling.windows import Split
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.statistics.climatology import Climatology, climatology_of
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.runs.description import Description
from smoe_hpc.tasks import make_task
from smoe_hpc.tasks.base import Learned, StoreTask


def task_on(
    recipe: Recipe, about: Description, data: str | os.PathLike[str] | None, first: str | None, last: str | None
) -> StoreTask:
    """The task of a run with a store of one's own, all of whose splits are the times between two days.

    Normalisation is the run's. The climatology is that of the training split, where those data are at hand; where they are
    not, a warning says that the scores against it are left out.

    Args:
        recipe: of the run.
        about: what its network takes and gives.
        data: a store, a folder or a pattern; for heat a folder of heat_test.h5 and so on. None takes the recipe's.
        first: first day, e.g. "2019-01-01"; the store's when None.
        last: last day, which belongs to it; the store's when None.

    Raises:
        ConfigError: days for a task that goes by runs.
        DataError: data that are missing or damaged, on another grid, or that lack a channel.
    """
    where = recipe.data.store if data is None else os.fspath(data)
    if about.axis != "time":
        if first is not None or last is not None:
            raise ConfigError(f"task={recipe.task} goes by runs, not by days; leave the days out")
        return make_task(replace(recipe, data=replace(recipe.data, store=where)))
    store = open_store(where)
    about.grid.require_same(store.grid, str(store.path))
    times = store.coords["time"] if "time" in store.coords else np.array([], dtype="datetime64[s]")
    if len(times):
        first, last = first or str(times[0].astype("datetime64[D]")), last or str(times[-1].astype("datetime64[D]"))
    channels = {channel.name: channel for channel in (*about.targets, *about.inputs)}.values()
    statistics = Statistics(
        tuple(channel.name for channel in channels),
        tuple(channel.mean for channel in channels),
        tuple(channel.std for channel in channels),
        0,
        recipe.data.splits.train,
        tuple(channel.transform for channel in channels),
    )
    climatology = _climatology(recipe, about) if recipe.task == "weather" else None
    changed = replace(recipe, data=replace(recipe.data, store=where))
    return make_task(changed, Learned(statistics, climatology, Split(f"{first}/{last}")))


def _climatology(recipe: Recipe, about: Description) -> Climatology | None:
    """Of the training split, if its data are at hand."""
    try:
        store = open_store(recipe.data.store)
        return climatology_of(store, Split(recipe.data.splits.train), [target.name for target in about.targets])
    except SmoeError as error:
        warnings.warn(f"scores against the climatology of the training split are left out: {error}", stacklevel=3)
        return None
