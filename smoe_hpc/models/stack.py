"""A few layers of one kind, one after the other: the model of every row in the heat and regional tables.

    x -> layer [+ bias] -> activation -> ... -> layer [+ bias]  [+ newest frame of x]

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per
expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smoe_hpc import config
from smoe_hpc.layers import Conv2d
from smoe_hpc.models.layer_factory import ACTIVATIONS, LayerFactory, newest_channels


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
        ConfigError: a missing region map, a residual without a frame for every output, a shared gate that reads its
            layer's input.
    """
    layers: list[nn.Module] = []
    biases: list[nn.Module] = []
    factory = LayerFactory(model, grid, region_map, generator)
    incoming = in_channels
    for channels in model.spatial_channels:
        layer, bias = factory.make(incoming, channels)
        layers.append(layer)
        biases.append(bias)
        incoming = channels
    head = None
    if model.head == "conv1x1":
        head = Conv2d(incoming, model.channels[-1], grid, kernel_size=1, bias=model.bias, generator=generator)
    added = newest_channels(model, in_channels, model.channels[-1], newest)
    return Stack(layers, biases, head, ACTIVATIONS[model.activation](), added)
