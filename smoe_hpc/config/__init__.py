"""Recipes: what an experiment is, as typed, frozen dataclasses that check themselves."""

from smoe_hpc.config.loading import load_recipe, recipe_names, recipe_summary, to_yaml
from smoe_hpc.config.model import Damping, Gate, Model, RoutingLoss
from smoe_hpc.config.schema import Data, Loader, Optimizer, Recipe, Run, Schedule, Splits, Training
from smoe_hpc.config.sharing import check_world

__all__ = [
    "Damping",
    "Data",
    "Gate",
    "Loader",
    "Model",
    "Optimizer",
    "Recipe",
    "RoutingLoss",
    "Run",
    "Schedule",
    "Splits",
    "Training",
    "check_world",
    "load_recipe",
    "recipe_names",
    "recipe_summary",
    "to_yaml",
]
