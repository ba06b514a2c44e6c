"""The rules that the sections of a recipe keep, each broken rule one ConfigError with value, rule and remedy.

Called when a dataclass of `schema.py` or `model.py` is made; :func:`check_world` later, when it is known how many ranks
share the batch. Settings that would do nothing are refused in `idle.py`.

Dimensions: N experts, K selected experts, F filters per expert.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from smoe_hpc.config import ranges
from smoe_hpc.errors import ConfigError

if TYPE_CHECKING:
    from smoe_hpc.config import model as models
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


def _choices(section: object, prefix: str) -> None:
    """Fields that take one of a few values hold one of them, also when Python code made the section."""
    for key, hint in get_type_hints(type(section)).items():
        if get_origin(hint) is Literal:
            value = getattr(section, key)
            if value not in get_args(hint):
                choices = [str(choice) for choice in get_args(hint)]
                guess = nearest(str(value), choices)
                hinted = f"; did you mean {guess}?" if guess else ""
                require(False, f"{prefix}{key}", value, f"must be one of {', '.join(choices)}{hinted}")


def _positive_count(key: str, value: int | None, example: int) -> None:
    require(value is None or value >= 1, key, value, f"must be at least 1, e.g. {key}={example}")


def _not_negative(key: str, value: float) -> None:
    require(math.isfinite(value) and value >= 0, key, value, "must be a finite number that is not negative")


def _positive(key: str, value: float | None, example: float) -> None:
    holds = value is None or (math.isfinite(value) and value > 0)
    require(holds, key, value, f"must be a finite number above 0, e.g. {key}={example:g}")


def _quantile(key: str, value: float) -> None:
    rule = "must lie between 0 and 1, both excluded; a little above selected / experts is the natural one"
    require(0 < value < 1, key, value, rule)


def check_data(data: schema.Data) -> None:
    """Window, noise and names of a Data section."""
    require(bool(data.store.strip()), "data.store", data.store, "must be a path, e.g. data.store=data/heat")
    ascending = data.inputs == sorted(set(data.inputs)) and bool(data.inputs) and data.inputs[-1] <= 0
    require(ascending, "data.inputs", data.inputs, "times must ascend and end at or before 0, e.g. [-12,-6,0]")
    require(data.lead > 0, "data.lead", data.lead, "the target must lie after the start, e.g. data.lead=6")
    for key in ("variables", "targets"):
        names = getattr(data, key)
        rule = f"must name at least one channel, each once; data.{key}=null takes all"
        require(names is None or (len(names) > 0 and len(set(names)) == len(names)), f"data.{key}", names, rule)
    _not_negative("data.noise", data.noise)
    _positive("data.noise_ratio", data.noise_ratio, 10)


def check_gate(gate: models.Gate) -> None:
    """Options that the kind of gate has."""
    _choices(gate, "model.gate.")
    if gate.kind == "latent":
        rule = "a latent gate reads no input, so no map either; set model.gate.kind=conv (or lcn, ...)"
        require(not gate.region_map, "model.gate.region_map", gate.region_map, rule)
    if gate.kind == "fixed":
        rule = "a fixed gate has no values to change; set model.gate.{}={} or another model.gate.kind"
        require(gate.noise == "none", "model.gate.noise", gate.noise, rule.format("noise", "none"))
        require(not gate.softmax, "model.gate.softmax", gate.softmax, rule.format("softmax", "false"))
        require(not gate.absolute, "model.gate.absolute", gate.absolute, rule.format("absolute", "false"))


def check_routing_loss(loss: models.RoutingLoss) -> None:
    """Quantile and weights."""
    _choices(loss, "model.routing_loss.")
    if isinstance(loss.quantile, str):
        rule = "must be balanced or a number, e.g. model.routing_loss.quantile=0.5"
        require(loss.quantile == "balanced", "model.routing_loss.quantile", loss.quantile, rule)
    else:
        _quantile("model.routing_loss.quantile", loss.quantile)
    for key in ("tolerance", "importance", "load", "spatial_agreement"):
        _not_negative(f"model.routing_loss.{key}", getattr(loss, key))


def check_damping(damping: models.Damping) -> None:
    """Factor in [0, 1] and a quantile."""
    rule = "must lie in 0 to 1: 0 stops the gradient of a wrong selection, 1 leaves it alone; e.g. 0.05"
    require(0 <= damping.factor <= 1, "model.damping.factor", damping.factor, rule)
    _not_negative("model.damping.tolerance", damping.tolerance)
    if damping.quantile is not None:
        _quantile("model.damping.quantile", damping.quantile)


def check_model(model: models.Model) -> None:
    """Shapes of the stack: kernel, channels, experts."""
    _choices(model, "model.")
    rule = "every layer needs at least one output channel, e.g. model.channels=[4,1]"
    require(bool(model.channels) and min(model.channels) >= 1, "model.channels", model.channels, rule)
    odd = model.kernel_size >= 1 and model.kernel_size % 2 == 1
    require(odd, "model.kernel_size", model.kernel_size, "must be odd, so that a filter has a middle; e.g. 3")
    _positive_count("model.num_experts", model.num_experts, 3)
    _positive_count("model.filters_per_expert", model.filters_per_expert, 1)
    rule = 'a "conv1x1" head is the last of several layers; add a layer (model.channels=[8,1]) or set model.head=same'
    require(model.head == "same" or len(model.channels) > 1, "model.channels", model.channels, rule)
    if model.kind == "smoe":
        _check_experts(model)


def _check_experts(model: models.Model) -> None:
    """K of every layer is whole, at most N, and fits the gate."""
    n, f = model.num_experts, model.filters_per_expert
    for channels in model.spatial_channels:
        below, above = channels // f * f, (channels // f + 1) * f
        fits = f"{below} or {above}" if below else f"{above}"
        rule = f"{channels} channels are not whole experts of model.filters_per_expert={f} filters; take {fits} channels"
        require(channels % f == 0, "model.channels", model.channels, rule)
        rule = (
            f"{channels} channels of {f} filters each select {channels // f} experts, but there are only {n}; "
            f"set model.num_experts to {channels // f} or more, or take at most {n * f} channels"
        )
        require(channels <= n * f, "model.channels", model.channels, rule)
    if model.gate.kind == "fixed":
        rule = f'a "fixed" gate selects one expert per pixel; every layer must have {f} channels'
        require(set(model.selected) == {1}, "model.channels", model.channels, rule)
    if model.routing_loss is not None and model.routing_loss.load > 0:
        rule = "it asks what other noise would select; set model.gate.noise=shared, or model.routing_loss.load=0"
        require(model.gate.noise != "none", "model.routing_loss.load", model.routing_loss.load, rule)
    if model.routing_loss is None and model.damping is not None and model.damping.quantile is None:
        # The default is silently left out, so that model.routing_loss=null alone is a whole override
        rule = "needs a quantile where there is no routing loss; set model.damping.quantile=0.5 or model.damping=null"
        require(model.damping == type(model.damping)(), "model.damping.factor", model.damping.factor, rule)
    if model.gate.share:
        rule = "layers have different inputs, so only a gate that reads none can be shared; set model.gate.kind=latent"
        require(model.gate.kind in ("latent", "fixed"), "model.gate.share", True, rule)
        rule = "a shared gate needs equally many selected experts in every layer; set model.gate.share=false"
        require(len(set(model.selected)) == 1, "model.channels", model.channels, rule)


def check_optimizer(optimizer: schema.Optimizer) -> None:
    """Rates above 0, decay rates below 1."""
    _choices(optimizer, "optimizer.")
    _positive("optimizer.lr", optimizer.lr, 1e-3)
    if optimizer.gate_lr is not None:
        _not_negative("optimizer.gate_lr", optimizer.gate_lr)
    whole = len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas)
    require(whole, "optimizer.betas", optimizer.betas, "must be two numbers in 0 to below 1, e.g. [0.9,0.999]")
    _positive("optimizer.eps", optimizer.eps, 1e-8)
    _not_negative("optimizer.weight_decay", optimizer.weight_decay)
    _positive("optimizer.clip", optimizer.clip, 1.0)


def check_schedule(schedule: schema.Schedule) -> None:
    """Plateau and early stop."""
    rule = "must lie above 0 and at most at 1, e.g. 0.1; 1 keeps the learning rates"
    require(0 < schedule.factor <= 1, "schedule.factor", schedule.factor, rule)
    require(schedule.patience >= 0, "schedule.patience", schedule.patience, "must not be negative, e.g. 15")
    _not_negative("schedule.min_lr", schedule.min_lr)
    _not_negative("schedule.min_delta", schedule.min_delta)
    _positive_count("schedule.early_stop", schedule.early_stop, 30)


def check_training(training: schema.Training) -> None:
    """Counts, divisibility of the batch, and what precision allows."""
    _choices(training, "training.")
    for key, example in (
        ("epochs", 150),
        ("max_steps", 10000),
        ("batch", 32),
        ("accumulation", 1),
        ("routing_refresh", 1),
        ("validate_every", 1000),
        ("threads", 2),
    ):
        _positive_count(f"training.{key}", getattr(training, key), example)
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


def check_world(recipe: schema.Recipe, world: int) -> None:
    """Refuse ranks and accumulation that cannot share the recipe's global batch with the result of one (ConfigError)."""
    accumulation = recipe.training.accumulation
    check_batch(recipe.training.batch, accumulation, world)
    if world * accumulation > 1 and recipe.model.kind == "smoe":
        _check_sharing(recipe.model, f"{world} process{'es' if world > 1 else ''} x training.accumulation={accumulation}")


def _check_sharing(model: models.Model, shared: str) -> None:
    """Nothing depends on how a batch is shared; ``shared`` says how it is."""
    gate, loss = model.gate, model.routing_loss
    one = "train with one process and training.accumulation=1"
    rule = f"its batch normalisation sees a micro-batch of {shared} alone; {one}, or set model.gate.kind=coordconv"
    require(gate.kind != "coordconv_multi", "model.gate.kind", gate.kind, rule)
    if loss is None or (gate.kind in ("latent", "fixed") and gate.noise != "per_sample"):
        return
    for name in ("importance", "load", "spatial_agreement"):
        key, weight = f"model.routing_loss.{name}", getattr(loss, name)
        rule = (
            "is not linear in the batch where the gate's values depend on the sample, so it would depend on how "
            f"{shared} share it; {one}, or set {key}=0"
        )
        require(weight == 0, key, weight, rule)


def check_run(run: schema.Run) -> None:
    """Intervals of checkpoints and logs."""
    require(bool(run.root.strip()), "run.root", run.root, "must be a folder, e.g. run.root=runs")
    _positive_count("run.checkpoint_every", run.checkpoint_every, 1000)
    _positive("run.checkpoint_seconds", run.checkpoint_seconds, 600)
    _positive_count("run.keep", run.keep, 2)
    _positive_count("run.log_every", run.log_every, 1)


def check_recipe(recipe: schema.Recipe) -> None:
    """What sections demand of each other and of the task."""
    _choices(recipe, "")
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
