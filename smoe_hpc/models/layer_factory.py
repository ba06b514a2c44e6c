"""One spatial layer of the kind that a recipe names: what the networks are made of.

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
    ChannelBias,
    CondConv2d,
    Conv2d,
    CoordConv2d,
    Gate,
    LocallyConnected2d,
    LowRankLocallyConnected2d,
    SpatialMoE2d,
    make_gate,
)
from smoe_hpc.layers.rules import auxiliary_losses

LEAKY_SLOPE = 0.3
"""Of leaky_relu, as Rasp and Thuerey 2021 have it."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE),
    "gelu": nn.GELU,
}


class LayerFactory:
    """Makes the spatial layers of a network one by one; they share a gate where the recipe says so.

    Args:
        model: the recipe's section.
        grid: (H, W).
        region_map: [H, W] integers, for the "fixed" gate and for gates with ``region_map``.
        generator: of the start values, and of the seeds of gate noise.
    """

    def __init__(
        self,
        model: config.Model,
        grid: tuple[int, int],
        region_map: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.grid, self.region_map, self.generator = model, grid, region_map, generator
        self._gates: dict[int, Gate] = {}

    def make(self, incoming: int, channels: int) -> tuple[nn.Module, nn.Module]:
        """A layer [B, incoming, H, W] -> [B, channels, H, W], and what follows it: a ``ChannelBias`` where the layer has no
        bias of its own, else ``nn.Identity``.

        Raises:
            ConfigError: a missing region map, a shared gate that reads its layer's input.
        """
        if self.model.kind == "smoe":
            layer = _smoe(self.model, incoming, channels, self.grid, self.region_map, self.generator, self._gates)
            return layer, ChannelBias(channels) if self.model.bias else nn.Identity()
        return _without_gate(self.model, incoming, channels, self.grid, self.generator), nn.Identity()


def newest_channels(model: config.Model, in_channels: int, outputs: int, newest: Sequence[int] | None) -> list[int] | None:
    """Input channels that a residual model adds its outputs to; None where the model is not residual.

    Args:
        model: the recipe's section.
        in_channels: C.
        outputs: channels of the output.
        newest: the input channels that hold the newest frame of the targets; None takes the last ones.

    Raises:
        ConfigError: their number is not that of the outputs.
    """
    if not model.residual:
        return None
    chosen = list(range(in_channels - outputs, in_channels)) if newest is None else list(newest)
    if len(chosen) != outputs or not all(0 <= channel < in_channels for channel in chosen):
        raise ConfigError(
            f"model.residual adds {outputs} outputs to the newest input frame, but of {in_channels} input channels "
            f"{chosen} hold it; let the targets be among the input variables, or set model.residual=false"
        )
    return chosen


def _without_gate(
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
    raise ConfigError(f"model.kind={model.kind!r} is not a layer of a network")


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
            f"model.gate.share=true with gate kind {model.gate.kind!r}: the layers' inputs differ; share a latent gate"
        )
    if gate is None:
        gate = _gate(model, selected, incoming, grid, region_map, generator)
        gates[selected] = gate
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
            routing_loss=model.routing_loss,
            damping=model.damping,
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
            f"gate kind {model.gate.kind!r} needs the true region map, which these data do not have; set model.gate.kind=latent"
        )
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
        ghost_batch=model.ghost_batch if model.normalises else None,
        generator=generator,
        softmax=model.gate.softmax,
        absolute=model.gate.absolute,
        noise=model.gate.noise,
        noise_seed=int(torch.randint(2**31, (), generator=generator)) if draws else 0,
        auxiliary=auxiliary_losses(model.routing_loss),
    )
