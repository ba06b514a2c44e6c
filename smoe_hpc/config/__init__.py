"""Recipes: what an experiment is, as typed, frozen dataclasses that check themselves."""

from smoe_hpc.config.data import Data, Splits
from smoe_hpc.config.gate import Gate
from smoe_hpc.config.loader import Loader
from smoe_hpc.config.model import Model
from smoe_hpc.config.optimizer import Optimizer, Schedule
from smoe_hpc.config.reading import load_recipe, parse_recipe, recipe_names, recipe_summary, to_yaml
from smoe_hpc.config.recipe import Recipe
from smoe_hpc.config.routing import Damping, RoutingLoss
from smoe_hpc.config.run import Run
from smoe_hpc.config.sharing import check_world
from smoe_hpc.config.training import Training

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
    "parse_recipe",
    "recipe_names",
    "recipe_summary",
    "to_yaml",
]
