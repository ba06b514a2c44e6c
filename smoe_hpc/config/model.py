"""The model section of a recipe: a network, its layers, its gate, the loss that the gate learns from, damping.

Dimensions: C input channels, H rows, W columns, N experts (|E| of the paper), K selected experts (E of the paper),
F filters per expert. "Paper" is Dryden and Hoefler, Spatial Mixture-of-Experts, NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from smoe_hpc.config import model_checks


@dataclass(frozen=True)
class Gate:
    """Which experts work where (paper, "Gating").

    Attributes:
        kind: "latent" is a learned tensor [N, H, W] independent of the input (tensor routing of the paper); "conv",
            "coordconv", "coordconv_multi", "lcn" and "linear" read the layer's input; "fixed" is the true region map.
        softmax: softmax over experts.
        absolute: absolute value of the gate.
        noise: Gaussian noise with std 1/N while training: "shared" draws one map for all samples, "per_sample"
            one for each.
        region_map: the true region map as an extra gate input (heat only; "fixed" uses the map without being asked).
        share: one gate for all layers of a network (they must agree in N and K).
    """

    kind: Literal["latent", "conv", "coordconv", "coordconv_multi", "lcn", "linear", "fixed"] = "latent"
    softmax: bool = False
    absolute: bool = False
    noise: Literal["none", "shared", "per_sample"] = "none"
    region_map: bool = False
    share: bool = False

    def __post_init__(self) -> None:
        model_checks.check_gate(self)


@dataclass(frozen=True)
class RoutingLoss:
    """The loss that the gate learns from (paper, "Routing classification loss").

    Attributes:
        quantile: share of the selections that count as correct, in (0, 1); "balanced" is a little above K/N, the only
            place where routing both learns and settles on data with irreducible error.
        tolerance: added to the quantile of the error (absolute, in units of the error).
        error_scale: what the error is divided by before the quantile: "none" (published), "loss_weight" (the weight of
            the task's loss at the pixel, such as cos(lat)), "running_mean" (its own mean over past steps at the pixel).
        importance: weight of the auxiliary loss that evens out the gate's sums over experts.
        load: weight of the auxiliary loss that evens out how often experts are selected.
        spatial_agreement: weight of the auxiliary loss that draws neighbouring pixels to the same expert.
    """

    quantile: str | float = "balanced"
    tolerance: float = 1e-5
    error_scale: Literal["none", "loss_weight", "running_mean"] = "none"
    importance: float = 0.0
    load: float = 0.0
    spatial_agreement: float = 0.0

    def __post_init__(self) -> None:
        model_checks.check_routing_loss(self)


@dataclass(frozen=True)
class Damping:
    """How much of the gradient reaches an expert through a wrong selection (paper, "Expert error damping").

    Attributes:
        factor: what the gradient of a wrong selection is multiplied by; 0 (published heat command) can leave an expert
            without any gradient for ever, see docs/heat.md; 0.1 is also reported.
        tolerance: added to the quantile of the error (absolute, in units of the error).
        quantile: share of the selections that is left alone, in (0, 1); null takes the routing loss's, and without
            one there is no damping.
    """

    factor: float = 0.05
    tolerance: float = 1e-3
    quantile: float | None = None

    def __post_init__(self) -> None:
        model_checks.check_damping(self)


@dataclass(frozen=True)
class Model:
    """A network whose spatial layers are of one kind, as in the rows of the paper's tables.

    Attributes:
        kind: "smoe", "conv", "coord_conv", "cond_conv" (mixture of experts over whole samples), "lcn" (locally
            connected) or "low_rank_lcn" (Elsayed et al. 2020).
        network: "stack", a few layers one after the other; "resnet", the network of Rasp and Thuerey 2021, whose blocks'
            convolutions are of ``kind``. Its activation is leaky ReLU, its outputs are as many as the targets.
        channels: stack only: output channels of each layer, the last the targets'. An smoe layer selects
            K = channels / F experts.
        width: resnet only: channels of its layers; K = width / F.
        blocks: resnet only: residual blocks, of two layers each.
        stem_kernel: resnet only: side of the first layer's filters, odd.
        dropout: resnet only: share of the values that is dropped after each layer while training, in [0, 1).
        ghost_batch: samples, consecutive in the global batch, whose statistics batch normalisation takes together
            (resnet, and gates of kind coordconv_multi); must divide the micro-batch of each process.
        kernel_size: side of the square filters, odd.
        padding: "zeros", "periodic_longitude" (columns wrap, rows zero) or "sphere" (rows continue beyond the pole,
            half a turn away).
        activation: stack only: between layers, none after the last.
        head: stack only: the last layer: "same" kind as the others, or "conv1x1", a plain convolution pixel by pixel.
        residual: the output is added to the newest input frame.
        bias: a bias per output channel (the published heat run has none).
        num_experts: N of smoe and cond_conv; the rank (number of filter banks) of low_rank_lcn.
        filters_per_expert: F, smoe only.
        weighted: each expert's output is multiplied by its gate value (published heat run: no).
        expert_order: channel order of selected experts: "rank" by gate value (the authors'), "id" by expert number.
        gate: see :class:`Gate`.
        routing_loss: see :class:`RoutingLoss`; null has none (a weighted gate then learns from the main loss).
        damping: see :class:`Damping`; null has none.
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
        model_checks.check_model(self)

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
