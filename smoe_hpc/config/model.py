"""The model section of a recipe: a network, its layers, its gate, the loss that the gate learns from, damping.

Dimensions: N experts (|E| of the paper), K selected experts (E of the paper), F filters per expert. "Paper" is Dryden and
Hoefler, Spatial Mixture-of-Experts, NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from smoe_hpc.config import rules
from smoe_hpc.config.gate import Gate
from smoe_hpc.config.routing import Damping, RoutingLoss


@dataclass(frozen=True)
class Model:
    """A network whose spatial layers are of one kind, as in the rows of the paper's tables.

    Attributes:
        kind: "smoe", "conv", "coord_conv", "cond_conv" (mixture of experts over whole samples), "lcn" (locally
            connected) or "low_rank_lcn" (Elsayed et al. 2020).
        network: "stack", a few layers one after the other; "resnet", the network of Rasp and Thuerey 2021, whose blocks have
            convolutions of ``model.kind``. Its activation is leaky ReLU, its outputs are as many as the targets.
        channels: stack only: output channels of each layer, each at least 1, the last the targets'. An smoe layer selects
            K = channels / F experts.
        width: resnet only: channels of its layers, at least 1; K = width / F.
        blocks: resnet only: residual blocks of two layers each, at least 1.
        stem_kernel: resnet only: side of the first layer's filters, odd.
        dropout: resnet only: share of the values that is dropped after each layer while training, from 0 to below 1.
        ghost_batch: resnet, and gates of kind coordconv_multi: samples, consecutive in the global batch, whose statistics
            batch normalisation takes together, at least 1; must divide the micro-batch of each process.
        kernel_size: side of the square filters, odd.
        padding: "zeros", "periodic_longitude" (columns wrap, rows zero) or "sphere" (rows continue beyond the pole, half a
            turn away).
        activation: stack only: between layers, none after the last.
        head: stack only: the last layer: "same" kind as the others, or "conv1x1", an ordinary convolution of each pixel.
        residual: the output is added to the newest input frame.
        bias: a bias per output channel (the published heat run has none).
        num_experts: N of smoe and cond_conv; the rank (number of filter banks) of low_rank_lcn; at least 1.
        filters_per_expert: smoe only: F, at least 1.
        weighted: smoe only: each expert's output is multiplied by its gate value (published heat run: no).
        expert_order: smoe only: channel order of the selected experts: "rank" by gate value (the authors'), "id" by expert
            number.
        gate: which experts work where (smoe only).
        routing_loss: the loss that the gate learns from (smoe only); null has none, and a weighted gate then learns from the
            main loss.
        damping: how much of the gradient reaches an expert through a wrong selection (smoe only); null leaves it as it is.
    """

    kind: Literal["smoe", "conv", "coord_conv", "cond_conv", "lcn", "low_rank_lcn"] = "smoe"
    network: Literal["stack", "resnet"] = "stack"
    channels: list[int] = field(default_factory=lambda: [1])
    width: int = 128
    blocks: int = 19
    stem_kernel: int = 7
    dropout: float = 0.1
    ghost_batch: int = 32
    kernel_size: int = 3
    padding: Literal["zeros", "periodic_longitude", "sphere"] = "zeros"
    activation: Literal["none", "relu", "leaky_relu", "gelu"] = "none"
    head: Literal["same", "conv1x1"] = "same"
    residual: bool = False
    bias: bool = True
    num_experts: int = 3
    filters_per_expert: int = 1
    weighted: bool = False
    expert_order: Literal["rank", "id"] = "rank"
    gate: Gate = field(default_factory=Gate)
    routing_loss: RoutingLoss | None = field(default_factory=RoutingLoss)
    damping: Damping | None = field(default_factory=Damping)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def spatial_channels(self) -> list[int]:
        """Output channels of the layers that are of ``kind`` (all but a "conv1x1" head; those of the blocks)."""
        if self.network == "resnet":
            return [self.width] * (2 * self.blocks)
        return self.channels[:-1] if self.head == "conv1x1" else self.channels

    @property
    def selected(self) -> list[int]:
        """K of each smoe layer."""
        return [channels // self.filters_per_expert for channels in self.spatial_channels]

    @property
    def normalises(self) -> bool:
        """Whether there is a batch normalisation, whose groups ``ghost_batch`` says."""
        return self.network == "resnet" or (self.kind == "smoe" and self.gate.kind == "coordconv_multi")


def _check(model: Model) -> None:
    """Shapes of the network: kernels, channels, experts."""
    rules.check_choices(model, "model.")
    rule = "every layer needs at least one output channel, e.g. model.channels=[4,1]"
    rules.require(bool(model.channels) and min(model.channels) >= 1, "model.channels", model.channels, rule)
    for key, example in (("kernel_size", 3), ("stem_kernel", 7)):
        size = getattr(model, key)
        rule = f"must be odd, so that a filter has a middle; e.g. {example}"
        rules.require(size >= 1 and size % 2 == 1, f"model.{key}", size, rule)
    for key, example in (("num_experts", 3), ("width", 128), ("blocks", 19), ("ghost_batch", 32)):
        rules.check_count(f"model.{key}", getattr(model, key), example)
    rule = "must lie in 0 to below 1, the share of values that are dropped; e.g. 0.1"
    rules.require(0 <= model.dropout < 1, "model.dropout", model.dropout, rule)
    rules.check_count("model.filters_per_expert", model.filters_per_expert, 1)
    rule = 'a "conv1x1" head is the last of several layers; add a layer (model.channels=[8,1]) or set model.head=same'
    rules.require(model.head == "same" or len(model.channels) > 1, "model.channels", model.channels, rule)
    if model.kind == "smoe":
        _check_experts(model)


def _check_experts(model: Model) -> None:
    """K of every layer is whole, at most N, and fits the gate."""
    n, f = model.num_experts, model.filters_per_expert
    resnet = model.network == "resnet"
    key, value = ("model.width", model.width) if resnet else ("model.channels", model.channels)
    for channels in model.spatial_channels:
        below, above = channels // f * f, (channels // f + 1) * f
        fits = f"{below} or {above}" if below else f"{above}"
        rule = f"{channels} channels are not whole experts of model.filters_per_expert={f} filters; take {fits} channels"
        rules.require(channels % f == 0, key, value, rule)
        rule = (
            f"{channels} channels of {f} filters each select {channels // f} experts, but there are only {n}; "
            f"set model.num_experts to {channels // f} or more, or take at most {n * f} channels"
        )
        rules.require(channels <= n * f, key, value, rule)
    if model.gate.kind == "fixed":
        rule = f'a "fixed" gate selects one expert per pixel; every layer must have {f} channels'
        rules.require(set(model.selected) == {1}, key, value, rule)
    if model.routing_loss is not None and model.routing_loss.load > 0:
        rule = "it asks what other noise would select; set model.gate.noise=shared, or model.routing_loss.load=0"
        rules.require(model.gate.noise != "none", "model.routing_loss.load", model.routing_loss.load, rule)
    if model.routing_loss is None and model.damping is not None and model.damping.quantile is None:
        # The default is silently left out, so that model.routing_loss=null alone is a whole override
        rule = "needs a quantile where there is no routing loss; set model.damping.quantile=0.5 or model.damping=null"
        rules.require(model.damping == Damping(), "model.damping.factor", model.damping.factor, rule)
    if model.gate.share:
        rule = "layers have different inputs, so only a gate that reads none can be shared; set model.gate.kind=latent"
        rules.require(not model.gate.reads_input, "model.gate.share", True, rule)
        rule = "a shared gate needs equally many selected experts in every layer; set model.gate.share=false"
        rules.require(len(set(model.selected)) == 1, key, value, rule)
