"""The rules that the model section of a recipe keeps: shapes, experts, gates; see `checks.py`.

Dimensions: N experts, K selected experts, F filters per expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smoe_hpc.config import checks

if TYPE_CHECKING:
    from smoe_hpc.config import model as models


def check_gate(gate: models.Gate) -> None:
    """Options that the kind of gate has."""
    checks.choices(gate, "model.gate.")
    if gate.kind == "latent":
        rule = "a latent gate reads no input, so no map either; set model.gate.kind=conv (or lcn, ...)"
        checks.require(not gate.region_map, "model.gate.region_map", gate.region_map, rule)
    if gate.kind == "fixed":
        rule = "a fixed gate has no values to change; set model.gate.{}={} or another model.gate.kind"
        checks.require(gate.noise == "none", "model.gate.noise", gate.noise, rule.format("noise", "none"))
        checks.require(not gate.softmax, "model.gate.softmax", gate.softmax, rule.format("softmax", "false"))
        checks.require(not gate.absolute, "model.gate.absolute", gate.absolute, rule.format("absolute", "false"))


def check_routing_loss(loss: models.RoutingLoss) -> None:
    """Quantile and weights."""
    checks.choices(loss, "model.routing_loss.")
    if isinstance(loss.quantile, str):
        rule = "must be balanced or a number, e.g. model.routing_loss.quantile=0.5"
        checks.require(loss.quantile == "balanced", "model.routing_loss.quantile", loss.quantile, rule)
    else:
        checks.quantile("model.routing_loss.quantile", loss.quantile)
    for key in ("tolerance", "importance", "load", "spatial_agreement"):
        checks.not_negative(f"model.routing_loss.{key}", getattr(loss, key))


def check_damping(damping: models.Damping) -> None:
    """Factor in [0, 1] and a quantile."""
    rule = "must lie in 0 to 1: 0 stops the gradient of a wrong selection, 1 leaves it alone; e.g. 0.05"
    checks.require(0 <= damping.factor <= 1, "model.damping.factor", damping.factor, rule)
    checks.not_negative("model.damping.tolerance", damping.tolerance)
    if damping.quantile is not None:
        checks.quantile("model.damping.quantile", damping.quantile)


def check_model(model: models.Model) -> None:
    """Shapes of the network: kernels, channels, experts."""
    checks.choices(model, "model.")
    rule = "every layer needs at least one output channel, e.g. model.channels=[4,1]"
    checks.require(bool(model.channels) and min(model.channels) >= 1, "model.channels", model.channels, rule)
    for key, example in (("kernel_size", 3), ("stem_kernel", 7)):
        size = getattr(model, key)
        rule = f"must be odd, so that a filter has a middle; e.g. {example}"
        checks.require(size >= 1 and size % 2 == 1, f"model.{key}", size, rule)
    for key, example in (("num_experts", 3), ("width", 128), ("blocks", 19), ("ghost_batch", 32)):
        checks.positive_count(f"model.{key}", getattr(model, key), example)
    rule = "must lie in 0 to below 1, the share of values that are dropped; e.g. 0.1"
    checks.require(0 <= model.dropout < 1, "model.dropout", model.dropout, rule)
    checks.positive_count("model.filters_per_expert", model.filters_per_expert, 1)
    rule = 'a "conv1x1" head is the last of several layers; add a layer (model.channels=[8,1]) or set model.head=same'
    checks.require(model.head == "same" or len(model.channels) > 1, "model.channels", model.channels, rule)
    if model.kind == "smoe":
        _check_experts(model)


def _check_experts(model: models.Model) -> None:
    """K of every layer is whole, at most N, and fits the gate."""
    n, f = model.num_experts, model.filters_per_expert
    resnet = model.network == "resnet"
    key, value = ("model.width", model.width) if resnet else ("model.channels", model.channels)
    for channels in model.spatial_channels:
        below, above = channels // f * f, (channels // f + 1) * f
        fits = f"{below} or {above}" if below else f"{above}"
        rule = f"{channels} channels are not whole experts of model.filters_per_expert={f} filters; take {fits} channels"
        checks.require(channels % f == 0, key, value, rule)
        rule = (
            f"{channels} channels of {f} filters each select {channels // f} experts, but there are only {n}; "
            f"set model.num_experts to {channels // f} or more, or take at most {n * f} channels"
        )
        checks.require(channels <= n * f, key, value, rule)
    if model.gate.kind == "fixed":
        rule = f'a "fixed" gate selects one expert per pixel; every layer must have {f} channels'
        checks.require(set(model.selected) == {1}, key, value, rule)
    if model.routing_loss is not None and model.routing_loss.load > 0:
        rule = "it asks what other noise would select; set model.gate.noise=shared, or model.routing_loss.load=0"
        checks.require(model.gate.noise != "none", "model.routing_loss.load", model.routing_loss.load, rule)
    if model.routing_loss is None and model.damping is not None and model.damping.quantile is None:
        # The default is silently left out, so that model.routing_loss=null alone is a whole override
        rule = "needs a quantile where there is no routing loss; set model.damping.quantile=0.5 or model.damping=null"
        checks.require(model.damping == type(model.damping)(), "model.damping.factor", model.damping.factor, rule)
    if model.gate.share:
        rule = "layers have different inputs, so only a gate that reads none can be shared; set model.gate.kind=latent"
        checks.require(model.gate.kind in ("latent", "fixed"), "model.gate.share", True, rule)
        rule = "a shared gate needs equally many selected experts in every layer; set model.gate.share=false"
        checks.require(len(set(model.selected)) == 1, key, value, rule)
