"""What a recipe says: a frozen dataclass a section, checked when it is made.

A recipe that exists is a recipe that can run. Each section stands in a file of its own and keeps its own rules; here are
those between sections. OmegaConf reads YAML and overrides into them (`reading.py`); nothing here knows of torch. The recipes
that come with the package are in `smoe_hpc/recipes/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from smoe_hpc.config import idle, ranges, rules
from smoe_hpc.config.data import Data
from smoe_hpc.config.loader import Loader
from smoe_hpc.config.model import Model
from smoe_hpc.config.optimizer import Optimizer, Schedule
from smoe_hpc.config.run import Run
from smoe_hpc.config.training import Training


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: names the run directory.
        task: "heat" (location-dependent heat diffusion, paper section 4.1), "regional" (forecast of a field on a
            regional latitude-longitude grid) or "weather" (medium-range forecast on a global one, paper section 4.2).
        data: which data, and what of it makes a sample.
        model: a network whose spatial layers are of one kind.
        optimizer: how parameters move.
        schedule: when learning rates fall and when training ends.
        training: how long, in which portions and how exactly.
        loader: how samples come into memory; changes no result.
        run: where a run is kept and what it writes.
    """

    name: str
    task: Literal["heat", "regional", "weather"]
    data: Data
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    loader: Loader = field(default_factory=Loader)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        _check_recipe(self)
        idle.check_idle(self.task, self.data, self.model)


def _check_recipe(recipe: Recipe) -> None:
    """What sections demand of each other and of the task."""
    rules.check_choices(recipe, "")
    usable = bool(recipe.name.strip()) and not set(recipe.name) & set('/\\:*?"<>|\n') and recipe.name not in (".", "..")
    rules.require(usable, "name", recipe.name, "names a folder: letters, digits, - and _, e.g. name=heat_smoe")
    _check_rates(recipe)
    data, gate = recipe.data, recipe.model.gate
    ranges.check_splits(recipe.task, data.splits.train, data.splits.validation, data.splits.test)
    if recipe.task == "heat":
        rule = "heat is not normalised, its score is relative to the value itself; set data.normalize=false"
        rules.require(not data.normalize, "data.normalize", data.normalize, rule)
        for key in ("variables", "targets"):
            rule = f"heat has one field, and noise alone decides what is its target; set data.{key}=null"
            rules.require(getattr(data, key) is None, f"data.{key}", getattr(data, key), rule)
        return
    if recipe.task == "weather":
        rule = "weather's channels differ in size by ten powers of ten; set data.normalize=true"
        rules.require(data.normalize, "data.normalize", data.normalize, rule)
    if recipe.model.kind == "smoe":
        rule = "only the heat task has a true region map; set model.gate.kind=latent or task=heat"
        rules.require(gate.kind != "fixed", "model.gate.kind", gate.kind, rule)
        rule = "only the heat task has a true region map; set model.gate.region_map=false or task=heat"
        rules.require(not gate.region_map, "model.gate.region_map", gate.region_map, rule)
    rule = "only the heat task makes noise; set data.noise=0"
    rules.require(data.noise == 0, "data.noise", data.noise, rule)


def _check_rates(recipe: Recipe) -> None:
    """No learning rate starts below the lowest one."""
    rule = f"is above optimizer.lr={recipe.optimizer.lr:g}, from which learning rates only fall; lower it"
    rules.require(recipe.schedule.min_lr <= recipe.optimizer.lr, "schedule.min_lr", recipe.schedule.min_lr, rule)
