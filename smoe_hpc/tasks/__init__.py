"""Tasks: which data, which model, which loss, which scores."""

from __future__ import annotations

from smoe_hpc.config import Recipe
from smoe_hpc.errors import ConfigError
from smoe_hpc.tasks.base import Scoreboard, Selection, StoreTask
from smoe_hpc.tasks.heat import HeatTask
from smoe_hpc.tasks.regional import RegionalTask
from smoe_hpc.tasks.weather import WeatherTask, prepare_data

TASKS: dict[str, type[StoreTask]] = {"heat": HeatTask, "regional": RegionalTask, "weather": WeatherTask}


def make_task(recipe: Recipe) -> StoreTask:
    """The task of a recipe, with its data opened.

    Raises:
        ConfigError: an unknown task.
        DataError: data that is missing or damaged.
    """
    if recipe.task not in TASKS:
        raise ConfigError(f"task={recipe.task!r} is not known; choose one of {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe)


__all__ = [
    "TASKS",
    "HeatTask",
    "RegionalTask",
    "Scoreboard",
    "Selection",
    "StoreTask",
    "WeatherTask",
    "make_task",
    "prepare_data",
]
