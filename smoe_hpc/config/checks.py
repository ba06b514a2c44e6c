"""The rules that the sections of a recipe keep, each broken rule one ConfigError with value, rule and remedy.

Called when a dataclass of `schema.py` is made. The rules of the model stand in `model_checks.py`, those of a batch that
ranks share in `sharing.py`; settings that would do nothing are refused in `idle.py`. What these files have in common is
here: one form of error for all, and the checks of single values.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from smoe_hpc.config import ranges
from smoe_hpc.errors import ConfigError

if TYPE_CHECKING:
    from smoe_hpc.config import schema


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that is most like a wrong one, None if none is."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def known(what: str, name: str, names: Iterable[str]) -> str:
    """``name`` if it is one of ``names``; otherwise a ConfigError with the nearest and all of them."""
    names = list(names)
    if name in names:
        return name
    guess = nearest(name, names)
    hint = f"did you mean {guess}? " if guess else ""
    raise ConfigError(f"no {what} {name!r}; {hint}there are: {', '.join(names)}")


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """One form for all errors: ``key=value: rule and remedy``."""
    if not holds:
        raise ConfigError(f"{key}={shown(value)}: {rule}")


def shown(value: object) -> str:
    """A value as YAML writes it, as far as that differs from Python."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def choices(section: object, prefix: str) -> None:
    """Fields that take one of a few values hold one of them, also when Python code made the section."""
    for key, hint in get_type_hints(type(section)).items():
        if get_origin(hint) is Literal:
            value = getattr(section, key)
            if value not in get_args(hint):
                allowed = [str(choice) for choice in get_args(hint)]
                guess = nearest(str(value), allowed)
                hinted = f"; did you mean {guess}?" if guess else ""
                require(False, f"{prefix}{key}", value, f"must be one of {', '.join(allowed)}{hinted}")


def positive_count(key: str, value: int | None, example: int) -> None:
    """At least 1, or None."""
    require(value is None or value >= 1, key, value, f"must be at least 1, e.g. {key}={example}")


def not_negative(key: str, value: float) -> None:
    """Finite, at least 0."""
    require(math.isfinite(value) and value >= 0, key, value, "must be a finite number that is not negative")


def positive(key: str, value: float | None, example: float) -> None:
    """Finite and above 0, or None."""
    holds = value is None or (math.isfinite(value) and value > 0)
    require(holds, key, value, f"must be a finite number above 0, e.g. {key}={example:g}")


def quantile(key: str, value: float) -> None:
    """Between 0 and 1, both excluded."""
    rule = "must lie between 0 and 1, both excluded; a little above selected / experts is the natural one"
    require(0 < value < 1, key, value, rule)


def check_data(data: schema.Data) -> None:
    """Window, noise and names of a Data section."""
    choices(data, "data.")
    require(bool(data.store.strip()), "data.store", data.store, "must be a path, e.g. data.store=data/heat")
    ascending = data.inputs == sorted(set(data.inputs)) and bool(data.inputs) and data.inputs[-1] <= 0
    require(ascending, "data.inputs", data.inputs, "times must ascend and end at or before 0, e.g. [-12,-6,0]")
    require(data.lead > 0, "data.lead", data.lead, "the target must lie after the start, e.g. data.lead=6")
    _check_leads(data)
    rule = "must name each constant once, e.g. data.constants=[orography]"
    require(len(set(data.constants)) == len(data.constants), "data.constants", data.constants, rule)
    positive_count("data.block", data.block, 32)
    for key in ("variables", "targets"):
        names = getattr(data, key)
        rule = f"must name at least one channel, each once; data.{key}=null takes all"
        require(names is None or (len(names) > 0 and len(set(names)) == len(names)), f"data.{key}", names, rule)
    not_negative("data.noise", data.noise)
    positive("data.noise_ratio", data.noise_ratio, 10)


def _check_leads(data: schema.Data) -> None:
    """Leads ascend, and are said in one place."""
    for key in ("leads", "validation_leads"):
        leads = getattr(data, key)
        ascending = leads is None or (leads == sorted(set(leads)) and bool(leads) and leads[0] > 0)
        require(ascending, f"data.{key}", leads, f"times must be positive and ascend, e.g. data.{key}=[72,120]")
    if data.leads is not None:
        rule = f"has no effect beside data.leads={data.leads}; set data.leads=[{data.lead}], or data.leads=null"
        require(data.lead == 1, "data.lead", data.lead, rule)
    if data.lead_mode == "direct":
        rule = "only a model of continuous lead is validated at leads of its own; set it to null, or data.lead_mode=continuous"
        require(data.validation_leads is None, "data.validation_leads", data.validation_leads, rule)
    else:
        rule = "needs leads to draw from; give at least two, e.g. data.leads=[6,12,24,48,72,96,120]"
        require(data.leads is not None and len(data.leads) > 1, "data.lead_mode", data.lead_mode, rule)


def check_loader(loader: schema.Loader) -> None:
    """Counts of a Loader section."""
    choices(loader, "loader.")
    positive_count("loader.workers", loader.workers, 2)
    positive_count("loader.prefetch", loader.prefetch, 2)


def check_optimizer(optimizer: schema.Optimizer) -> None:
    """Rates above 0, decay rates below 1."""
    choices(optimizer, "optimizer.")
    positive("optimizer.lr", optimizer.lr, 1e-3)
    if optimizer.gate_lr is not None:
        not_negative("optimizer.gate_lr", optimizer.gate_lr)
    whole = len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas)
    require(whole, "optimizer.betas", optimizer.betas, "must be two numbers in 0 to below 1, e.g. [0.9,0.999]")
    positive("optimizer.eps", optimizer.eps, 1e-8)
    not_negative("optimizer.weight_decay", optimizer.weight_decay)
    positive("optimizer.clip", optimizer.clip, 1.0)


def check_schedule(schedule: schema.Schedule) -> None:
    """Plateau and early stop."""
    rule = "must lie above 0 and at most at 1, e.g. 0.1; 1 keeps the learning rates"
    require(0 < schedule.factor <= 1, "schedule.factor", schedule.factor, rule)
    require(schedule.patience >= 0, "schedule.patience", schedule.patience, "must not be negative, e.g. 15")
    not_negative("schedule.min_lr", schedule.min_lr)
    not_negative("schedule.min_delta", schedule.min_delta)
    positive_count("schedule.early_stop", schedule.early_stop, 30)


def check_training(training: schema.Training) -> None:
    """Counts, divisibility of the batch, and what precision allows."""
    choices(training, "training.")
    for key, example in (
        ("epochs", 150),
        ("max_steps", 10000),
        ("batch", 32),
        ("accumulation", 1),
        ("routing_refresh", 1),
        ("validate_every", 1000),
        ("threads", 2),
    ):
        positive_count(f"training.{key}", getattr(training, key), example)
    require(training.seed >= 0, "training.seed", training.seed, "must not be negative, e.g. training.seed=0")
    target = training.stop_at_score
    require(target is None or math.isfinite(target), "training.stop_at_score", target, "must be finite, or null")
    check_batch(training.batch, training.accumulation, world=1)
    rule = "ZeRO keeps its state in float32, which would round float64; set training.zero_stage=0"
    require(training.precision != "float64" or training.zero_stage == 0, "training.precision", "float64", rule)


def check_batch(batch: int, accumulation: int, world: int) -> None:
    """The global batch falls into equal portions, one per rank and accumulation step."""
    portions = accumulation * world
    below, above = batch // portions * portions, (batch // portions + 1) * portions
    parts = (f"{world} ranks x " if world > 1 else "") + f"training.accumulation={accumulation}"
    fits = f"{below} or {above}" if below else f"{above}"
    rule = f"must be a multiple of {portions} ({parts}); set training.batch={fits}"
    require(batch % portions == 0, "training.batch", batch, rule)


def check_run(run: schema.Run) -> None:
    """Intervals of checkpoints and logs."""
    require(bool(run.root.strip()), "run.root", run.root, "must be a folder, e.g. run.root=runs")
    positive_count("run.checkpoint_every", run.checkpoint_every, 1000)
    positive("run.checkpoint_seconds", run.checkpoint_seconds, 600)
    positive_count("run.keep", run.keep, 2)
    positive_count("run.log_every", run.log_every, 1)


def check_recipe(recipe: schema.Recipe) -> None:
    """What sections demand of each other and of the task."""
    choices(recipe, "")
    plain = bool(recipe.name.strip()) and not set(recipe.name) & set('/\\:*?"<>|\n') and recipe.name not in (".", "..")
    require(plain, "name", recipe.name, "names a folder: letters, digits, - and _, e.g. name=heat_smoe")
    _check_rates(recipe)
    data, gate = recipe.data, recipe.model.gate
    ranges.check_splits(recipe.task, data.splits.train, data.splits.validation, data.splits.test)
    if recipe.task == "heat":
        rule = "heat is not normalised, its score is relative to the value itself; set data.normalize=false"
        require(not data.normalize, "data.normalize", data.normalize, rule)
        for key in ("variables", "targets"):
            rule = f"heat has one field, and noise alone decides what is its target; set data.{key}=null"
            require(getattr(data, key) is None, f"data.{key}", getattr(data, key), rule)
        return
    if recipe.task == "weather":
        rule = "weather's channels differ in size by ten powers of ten; set data.normalize=true"
        require(data.normalize, "data.normalize", data.normalize, rule)
    if recipe.model.kind == "smoe":
        rule = "only the heat task has a true region map; set model.gate.kind=latent or task=heat"
        require(gate.kind != "fixed", "model.gate.kind", gate.kind, rule)
        rule = "only the heat task has a true region map; set model.gate.region_map=false or task=heat"
        require(not gate.region_map, "model.gate.region_map", gate.region_map, rule)
    rule = "only the heat task makes noise; set data.noise=0"
    require(data.noise == 0, "data.noise", data.noise, rule)


def _check_rates(recipe: schema.Recipe) -> None:
    """No learning rate starts below the lowest one."""
    rule = f"is above optimizer.lr={recipe.optimizer.lr:g}, from which learning rates only fall; lower it"
    require(recipe.schedule.min_lr <= recipe.optimizer.lr, "schedule.min_lr", recipe.schedule.min_lr, rule)
