"""Tasks: which data, which model, which loss, which scores."""

from __future__ import annotations

from smoe_hpc.config import Recipe
from smoe_hpc.errors import ConfigError
from smoe_hpc.tasks.base import Learned, Scoreboard, StoreTask
from smoe_hpc.tasks.heat import HeatTask
from smoe_hpc.tasks.regional import RegionalTask
from smoe_hpc.tasks.weather import WeatherTask, prepare_data

TASKS: dict[str, type[StoreTask]] = {"heat": HeatTask, "regional": RegionalTask, "weather": WeatherTask}


def make_task(recipe: Recipe, learned: Learned | None = None) -> StoreTask:
    """The task of a recipe, with its data opened.

    Args:
        recipe: the experiment.
        learned: what was taken from the training data, where the recipe reads others (`smoe_hpc.tasks.other_data`).

    Raises:
        ConfigError: an unknown task.
        DataError: data that is missing or damaged.
    """
    if recipe.task not in TASKS:
        raise ConfigError(f"task={recipe.task!r} is not known; choose one of {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe, learned)


__all__ = [
    "TASKS",
    "HeatTask",
    "Learned",
    "RegionalTask",
    "Scoreboard",
    "StoreTask",
    "WeatherTask",
    "make_task",
    "prepare_data",
]
