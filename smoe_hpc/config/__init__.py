"""Recipes: what an experiment is, as typed, frozen dataclasses that check themselves."""

from smoe_hpc.config.checks import check_world
from smoe_hpc.config.loading import load_recipe, recipe_names, recipe_summary, to_yaml
from smoe_hpc.config.model import Damping, Gate, Model, RoutingLoss
from smoe_hpc.config.schema import Data, Optimizer, Recipe, Run, Schedule, Splits, Training

__all__ = [
    "Damping",
    "Data",
    "Gate",
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
