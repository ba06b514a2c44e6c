"""Settings without effect are refused: whoever sets one believes that it does something.

Two sorts: keys of SMoE layers where the layers are of another kind, and SMoE options that cancel each other out.

Dimensions: N experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from smoe_hpc.config.data import Data
from smoe_hpc.config.model import Model
from smoe_hpc.config.rules import require, shown
from smoe_hpc.errors import ConfigError

_OF_SMOE = ("filters_per_expert", "weighted", "expert_order", "gate", "routing_loss", "damping")
_WITH_EXPERTS = ("smoe", "cond_conv", "low_rank_lcn")
_OPTIONAL = ("model.routing_loss", "model.damping")
_OF_STACK = ("channels", "activation", "head")
_OF_RESNET = ("width", "blocks", "stem_kernel", "dropout")
_NOT_OF_TASK = {
    "heat": ("leads", "lead_mode", "validation_leads", "constants", "gaps"),
    "regional": ("leads", "lead_mode", "validation_leads", "constants"),
    "weather": ("noise_ratio",),
}


def check_idle(task: str, data: Data, model: Model) -> None:
    """Refuse the first setting that has no effect (ConfigError)."""
    _check_task(task, data)
    _check_network(model)
    if model.kind != "smoe":
        _check_other_kind(model)
        return
    _check_learning(model)
    loss = model.routing_loss
    if loss is not None and task == "heat":
        rule = "heat's loss has no weight to divide by; set model.routing_loss.error_scale=none or running_mean"
        require(loss.error_scale != "loss_weight", "model.routing_loss.error_scale", loss.error_scale, rule)


def _check_task(task: str, data: Data) -> None:
    """Keys that the task does not read keep their defaults.

    A block's length may be set where nothing goes by blocks: ``data.order`` is a switch, and a recipe brings the length along.
    """
    default = type(data)(store=data.store)
    for name in _NOT_OF_TASK[task]:
        rule = f"has no effect with task={task}; set data.{name}={shown(getattr(default, name))}"
        require(getattr(data, name) == getattr(default, name), f"data.{name}", getattr(data, name), rule)


def _check_network(model: Model) -> None:
    """Keys of the other network keep their defaults; so does the group where nothing is normalised."""
    default = type(model)()
    other = "stack" if model.network == "resnet" else "resnet"
    idle = list(_OF_STACK if model.network == "resnet" else _OF_RESNET)
    remedy = f"or model.network={other}"
    if not model.normalises:
        idle.append("ghost_batch")
        remedy += " (or a gate of kind coordconv_multi, for model.ghost_batch)" if model.kind == "smoe" else ""
    for name in idle:
        value, usual = getattr(model, name), getattr(default, name)
        rule = f"has no effect with model.network={model.network}; set model.{name}={shown(usual)}, {remedy}"
        require(value == usual, f"model.{name}", value, rule)


def _check_other_kind(model: Model) -> None:
    """Keys that only SMoE layers read keep their defaults, or are null; so does N where the kind has no experts."""
    default = type(model)()
    names = _OF_SMOE if model.kind in _WITH_EXPERTS else ("num_experts", *_OF_SMOE)
    for name in names:
        for key, value, usual in _changed(f"model.{name}", getattr(model, name), getattr(default, name)):
            section = key.rpartition(".")[0]
            remedy = f"{section}=null" if section in _OPTIONAL else f"{key}={shown(usual)}"
            kinds = ", ".join(_WITH_EXPERTS) if name == "num_experts" else "smoe"
            raise ConfigError(
                f"{key}={shown(value)} has no effect with model.kind={model.kind}; set {remedy}, or model.kind to {kinds}"
            )


def _changed(key: str, value: object, default: object) -> Iterator[tuple[str, object, object]]:
    """(key, value, default) of what differs; null differs from nothing, for it asks for nothing."""
    if value is not None and is_dataclass(value):
        for entry in fields(value):
            yield from _changed(f"{key}.{entry.name}", getattr(value, entry.name), getattr(default, entry.name))
    elif value is not None and value != default:
        yield key, value, default


def _check_learning(model: Model) -> None:
    """The gate learns from something, and every auxiliary loss has a gradient."""
    gate, loss = model.gate, model.routing_loss
    if loss is None:
        learns = model.weighted or gate.kind == "fixed" or all(k == model.num_experts for k in model.selected)
        rule = "the gate would never learn; keep a routing loss (model.routing_loss={}), or set model.weighted=true"
        require(learns, "model.routing_loss", None, rule)
        return
    if gate.kind == "fixed":
        rule = "a fixed gate learns nothing; set model.routing_loss.importance=0"
        require(loss.importance == 0, "model.routing_loss.importance", loss.importance, rule)
    if not gate.reads_input:
        rule = (
            f"compares the gate's values of samples, which are equal for a {gate.kind} gate; set "
            "model.routing_loss.spatial_agreement=0 or a gate that reads its input, e.g. model.gate.kind=conv"
        )
        require(loss.spatial_agreement == 0, "model.routing_loss.spatial_agreement", loss.spatial_agreement, rule)
    rule = (
        "with model.weighted=true the gate's labels and damping would each need a mean of its own; set "
        "model.routing_loss.error_scale=none, or model.weighted=false"
    )
    both = model.weighted and loss.error_scale == "running_mean"
    require(not both, "model.routing_loss.error_scale", loss.error_scale, rule)
