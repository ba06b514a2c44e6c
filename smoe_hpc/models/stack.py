"""A few layers of one kind, one after the other: the model of every row in the heat and regional tables.

    x -> layer [+ bias] -> activation -> ... -> layer [+ bias]  [+ newest frame of x]

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per
expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc import config
from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import (
    AuxiliaryLosses,
    ChannelBias,
    CondConv2d,
    Conv2d,
    CoordConv2d,
    Damping,
    Gate,
    LocallyConnected2d,
    LowRankLocallyConnected2d,
    RoutingLoss,
    SpatialMoE2d,
    make_gate,
)

LEAKY_SLOPE = 0.3
"""Of leaky_relu, as Rasp and Thuerey 2021 have it."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE),
    "gelu": nn.GELU,
}


class Stack(nn.Module):
    """Layers in order, an activation between each two; see the head of this file.

    Args:
        layers: the spatial layers.
        biases: what is added after each of them; ``nn.Identity`` for a layer that has a bias of its own or none.
        head: a layer after the spatial ones, or None.
        activation: between layers.
        newest: channels of the input that the output is added to, one for each output channel; None adds nothing.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        biases: Sequence[nn.Module],
        head: nn.Module | None,
        activation: nn.Module,
        newest: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.layers, self.biases = nn.ModuleList(layers), nn.ModuleList(biases)
        self.head, self.activation = head, activation
        self.newest = None if newest is None else list(newest)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels of the last layer, H, W]."""
        y = x
        for number, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            y = bias(layer(y if number == 0 else self.activation(y)))
        if self.head is not None:
            y = self.head(self.activation(y))
        return y if self.newest is None else y + x[:, self.newest]


def build_stack(
    model: config.Model,
    in_channels: int,
    grid: tuple[int, int],
    region_map: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    newest: Sequence[int] | None = None,
) -> Stack:
    """The model that a recipe describes; ``.layers`` of it are the spatial layers in order.

    Args:
        model: the recipe's section.
        in_channels: C of the input.
        grid: (H, W).
        region_map: [H, W] integers, for the "fixed" gate and for gates with ``region_map``.
        generator: of the start values, and of the seeds of gate noise.
        newest: for a residual model, the input channels that hold the newest frame of the targets, in their order;
            None takes the last ones.

    Raises:
        ConfigError: a region map that is needed and not there, a residual without a frame for every output, a shared
            gate that reads its layer's input.
    """
    layers: list[nn.Module] = []
    biases: list[nn.Module] = []
    gates: dict[int, Gate] = {}
    incoming = in_channels
    for channels in model.spatial_channels:
        if model.kind == "smoe":
            layers.append(_smoe(model, incoming, channels, grid, region_map, generator, gates))
            biases.append(ChannelBias(channels) if model.bias else nn.Identity())
        else:
            layers.append(_plain(model, incoming, channels, grid, generator))
            biases.append(nn.Identity())
        incoming = channels
    head = None
    if model.head == "conv1x1":
        head = Conv2d(incoming, model.channels[-1], grid, kernel_size=1, bias=model.bias, generator=generator)
    return Stack(layers, biases, head, ACTIVATIONS[model.activation](), _newest(model, in_channels, newest))


def _newest(model: config.Model, in_channels: int, newest: Sequence[int] | None) -> list[int] | None:
    if not model.residual:
        return None
    outputs = model.channels[-1]
    chosen = list(range(in_channels - outputs, in_channels)) if newest is None else list(newest)
    if len(chosen) != outputs or not all(0 <= channel < in_channels for channel in chosen):
        raise ConfigError(
            f"model.residual adds {outputs} outputs to the newest input frame, but of {in_channels} input channels "
            f"{chosen} hold it; let the targets be among the input variables, or set model.residual=false"
        )
    return chosen


def _plain(
    model: config.Model, incoming: int, channels: int, grid: tuple[int, int], generator: torch.Generator | None
) -> nn.Module:
    sizes = (incoming, channels, grid)
    common: dict[str, Any] = {
        "kernel_size": model.kernel_size,
        "padding": model.padding,
        "bias": model.bias,
        "generator": generator,
    }
    if model.kind == "conv":
        return Conv2d(*sizes, **common)
    if model.kind == "coord_conv":
        return CoordConv2d(*sizes, **common)
    if model.kind == "cond_conv":
        return CondConv2d(*sizes, num_experts=model.num_experts, **common)
    if model.kind == "lcn":
        return LocallyConnected2d(*sizes, **common)
    if model.kind == "low_rank_lcn":
        return LowRankLocallyConnected2d(*sizes, rank=model.num_experts, **common)
    raise ConfigError(f"model.kind={model.kind!r} is no layer of a stack")


def _smoe(
    model: config.Model,
    incoming: int,
    channels: int,
    grid: tuple[int, int],
    region_map: Tensor | None,
    generator: torch.Generator | None,
    gates: dict[int, Gate],
) -> SpatialMoE2d:
    """An SMoE layer; ``gates`` holds those made so far by K, to be shared where the recipe says so."""
    selected = channels // model.filters_per_expert
    gate = gates.get(selected) if model.gate.share else None
    if gate is not None and gate.depends_on_input:
        raise ConfigError(
            f"model.gate.share=true with gate kind {model.gate.kind!r}: inputs of layers differ; share a latent gate"
        )
    if gate is None:
        gate = _gate(model, selected, incoming, grid, region_map, generator)
        gates[selected] = gate
    rules, wrong = model.routing_loss, model.damping
    routing_loss = None if rules is None else RoutingLoss(rules.quantile, rules.tolerance, rules.error_scale)
    damping = None if wrong is None else Damping(wrong.factor, wrong.tolerance, wrong.quantile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the recipe has been checked for its working range already
        return SpatialMoE2d(
            incoming,
            model.num_experts,
            selected,
            grid,
            filters_per_expert=model.filters_per_expert,
            kernel_size=model.kernel_size,
            padding=model.padding,
            gate=gate,
            weighted=model.weighted,
            expert_order=model.expert_order,
            routing_loss=routing_loss,
            damping=damping,
            generator=generator,
        )


def _gate(
    model: config.Model,
    selected: int,
    incoming: int,
    grid: tuple[int, int],
    region_map: Tensor | None,
    generator: torch.Generator | None,
) -> Gate:
    wants_map = model.gate.region_map or model.gate.kind == "fixed"
    if wants_map and region_map is None:
        raise ConfigError(
            f"gate kind {model.gate.kind!r} needs the true region map, which this data does not have; use kind: latent"
        )
    auxiliary = None
    if model.routing_loss is not None:
        losses = model.routing_loss
        auxiliary = AuxiliaryLosses(losses.importance, losses.load, losses.spatial_agreement)
    # Noise that two gates share would make them choose alike.
    draws = model.gate.noise != "none"
    return make_gate(
        model.gate.kind,
        model.num_experts,
        selected,
        grid,
        in_channels=incoming,
        kernel_size=model.kernel_size,
        padding=model.padding,
        region_map=region_map if wants_map else None,
        generator=generator,
        softmax=model.gate.softmax,
        absolute=model.gate.absolute,
        noise=model.gate.noise,
        noise_seed=int(torch.randint(2**31, (), generator=generator)) if draws else 0,
        auxiliary=auxiliary,
    )
