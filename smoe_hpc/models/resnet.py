"""The residual network of Rasp and Thuerey 2021 (section 2.2), with any kind of layer in its blocks.

    x -> conv 7x7, unit -> blocks of (layer 3x3, unit) twice, added to what came in -> conv 3x3 -> targets
    unit: leaky ReLU 0.3, batch normalisation, dropout

The first and the last layer are ordinary convolutions for every kind. Replacing a convolution by an SMoE layer keeps the
number of channels (paper, section 4.2), and K selected experts are its output channels: the last layer has too few of them
for a choice of experts (three for three targets), and the first reads 117 channels through 7x7 filters, of which a bank for
the experts would outweigh a block.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, K selected experts, F filters per expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc import config
from smoe_hpc.layers import Conv2d, CounterDropout, GhostBatchNorm2d, spatial_gates
from smoe_hpc.layers.convolutions.grid_layer import GridLayer
from smoe_hpc.models.layer_factory import ACTIVATIONS, LayerFactory, newest_channels

EPS, MOMENTUM = 1e-3, 0.01
"""Of the batch normalisation: Keras' defaults (its momentum of 0.99 is 0.01 as torch counts)."""


class Unit(nn.Sequential):
    """A layer, its bias, leaky ReLU, ghost batch normalisation, dropout."""

    def __init__(self, layer: nn.Module, bias: nn.Module, channels: int, group: int, dropout: CounterDropout | None) -> None:
        super().__init__()
        self.layer = layer
        if not isinstance(bias, nn.Identity):
            self.bias = bias
        self.activation = ACTIVATIONS["leaky_relu"]()
        self.norm = GhostBatchNorm2d(channels, group, eps=EPS, momentum=MOMENTUM)
        if dropout is not None:
            self.dropout = dropout


class Block(nn.Module):
    """Units in order, their output added to their input."""

    def __init__(self, *units: Unit) -> None:
        super().__init__()
        self.units = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> the same shape."""
        y: Tensor = x + self.units(x)
        return y


class ResNet(nn.Module):
    """See the head of this file.

    Args:
        stem: the first unit.
        blocks: the residual blocks.
        head: the last convolution.
        newest: channels of the input that the output is added to, one for each output channel; None adds nothing.
    """

    def __init__(self, stem: Unit, blocks: Sequence[Block], head: nn.Module, newest: Sequence[int] | None) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head
        self.newest = None if newest is None else list(newest)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, targets, H, W]."""
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y if self.newest is None else y + x[:, self.newest]


def build_resnet(
    model: config.Model,
    in_channels: int,
    out_channels: int,
    grid: tuple[int, int],
    region_map: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    newest: Sequence[int] | None = None,
    seed: int = 0,
) -> ResNet:
    """The network that a recipe with ``model.network=resnet`` describes.

    Args:
        model: the recipe's section.
        in_channels: C.
        out_channels: targets.
        grid: (H, W).
        region_map: [H, W] integers, for gates that read it.
        generator: of the start values (Glorot and Bengio 2010, uniform; biases 0).
        newest: see :func:`smoe_hpc.models.build_stack`.
        seed: of dropout.

    Raises:
        ConfigError: invalid options of a layer, or a residual without a frame for every output.
    """
    factory = LayerFactory(model, grid, region_map, generator)
    common: dict[str, Any] = {"padding": model.padding, "bias": model.bias, "generator": generator}
    dropouts = 0

    def unit(layer: nn.Module, bias: nn.Module) -> Unit:
        nonlocal dropouts
        dropout = CounterDropout(model.dropout, seed, dropouts) if model.dropout else None
        dropouts += 1
        return Unit(layer, bias, model.width, model.ghost_batch, dropout)

    stem = unit(Conv2d(in_channels, model.width, grid, kernel_size=model.stem_kernel, **common), nn.Identity())
    blocks = [Block(*(unit(*factory.make(model.width, model.width)) for _ in range(2))) for _ in range(model.blocks)]
    head = Conv2d(model.width, out_channels, grid, kernel_size=model.kernel_size, **common)
    network = ResNet(stem, blocks, head, newest_channels(model, in_channels, out_channels, newest))
    _start(network, generator)
    return network


def _start(network: ResNet, generator: torch.Generator | None) -> None:
    """Glorot's uniform start for the filters of all layers on the grid, with the fans of an ordinary convolution; biases
    are zero. Gates, and the layers that mix filters, keep their own start."""
    of_gates = {id(module) for gate, _ in spatial_gates(network) for module in gate.modules()}
    with torch.no_grad():
        for module in network.modules():
            if id(module) in of_gates or not isinstance(module, GridLayer):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name == "weight":
                    bound = math.sqrt(6 / ((module.in_channels + module.out_channels) * module.kernel_size**2))
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name == "bias":
                    parameter.zero_()
