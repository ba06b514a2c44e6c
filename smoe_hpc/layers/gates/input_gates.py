"""Gates that compute their values from the layer's input.

They read the input detached: the routing loss would otherwise leak into the error signals of the layers below.

Dimensions: B batch, C input channels, N experts, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.layers.convolutions.convolution import Conv2d
from smoe_hpc.layers.convolutions.coord_conv import CoordConv2d
from smoe_hpc.layers.convolutions.locally_connected import LocallyConnected2d
from smoe_hpc.layers.gates.fixed import check_region_map
from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.ghost_batch_norm import GhostBatchNorm2d


class InputGate(Gate):
    """A gate whose values are a network of the input.

    Args:
        num_experts, selected, grid: N, K, (H, W).
        in_channels: C of the layer's input.
        kernel_size, padding: of the gate's convolutions.
        region_map: [H, W], appended to the input as one more channel.
        detach_input: keep the routing loss out of the layers below.
        ghost_batch: samples that the network's batch normalisation takes together, so that it does not depend on how
            processes share a batch; None normalises whatever comes, as ``torch.nn.BatchNorm2d``.
        generator: of the start values.
        options: of :class:`Gate`.
    """

    depends_on_input = True
    region_channel: Tensor | None

    def __init__(
        self,
        num_experts: int,
        selected: int,
        grid: tuple[int, int],
        *,
        in_channels: int,
        kernel_size: int = 3,
        padding: str = "zeros",
        region_map: Tensor | None = None,
        detach_input: bool = True,
        ghost_batch: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, selected, grid, **options)
        self.detach_input, self.ghost_batch = detach_input, ghost_batch
        channel = None if region_map is None else check_region_map(region_map, self.grid).to(torch.float32)[None, None]
        self.register_buffer("region_channel", channel)
        self.network = self.make_network(
            in_channels + (channel is not None), kernel_size=kernel_size, padding=padding, generator=generator
        )

    def make_network(self, in_channels: int, *, kernel_size: int, padding: str, generator: torch.Generator | None) -> nn.Module:
        """The network [B, in_channels, H, W] -> [B, N, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its network is")

    def raw_values(self, x: Tensor) -> Tensor:
        """[B, N, H, W]."""
        x = x.detach() if self.detach_input else x
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if self.region_channel is not None:
            x = torch.cat([x, self.region_channel.to(x.dtype).expand(x.shape[0], -1, -1, -1)], dim=1)
        return self.network(x)


class ConvGate(InputGate):
    """One convolution without bias."""

    def make_network(self, in_channels: int, **options: Any) -> nn.Module:  # noqa: D102
        return Conv2d(in_channels, self.num_experts, self.grid, bias=False, **options)


class CoordConvGate(InputGate):
    """One convolution over the input and its coordinates, without bias."""

    def make_network(self, in_channels: int, **options: Any) -> nn.Module:  # noqa: D102
        return CoordConv2d(in_channels, self.num_experts, self.grid, bias=False, **options)


class CoordConvMultiGate(InputGate):
    """CoordConv, then two convolutions, N channels each, batch normalisation and ReLU between them."""

    def make_network(self, in_channels: int, **options: Any) -> nn.Module:  # noqa: D102
        experts = self.num_experts
        layers: list[nn.Module] = [CoordConv2d(in_channels, experts, self.grid, bias=False, **options)]
        for _ in range(2):
            layers += [self._normalisation(), nn.ReLU(), Conv2d(experts, experts, self.grid, bias=False, **options)]
        return nn.Sequential(*layers)

    def _normalisation(self) -> nn.Module:
        normal = nn.BatchNorm2d(self.num_experts)
        if self.ghost_batch is None:
            return normal
        assert normal.momentum is not None
        return GhostBatchNorm2d(self.num_experts, self.ghost_batch, eps=normal.eps, momentum=normal.momentum)


class LocallyConnectedGate(InputGate):
    """One filter a pixel and expert, without bias."""

    def make_network(self, in_channels: int, **options: Any) -> nn.Module:  # noqa: D102
        return LocallyConnected2d(in_channels, self.num_experts, self.grid, bias=False, **options)


class LinearGate(InputGate):
    """Every value sees the whole input: N C (H W)^2 weights, for small grids alone."""

    def make_network(  # noqa: D102
        self, in_channels: int, *, kernel_size: int, padding: str, generator: torch.Generator | None
    ) -> nn.Module:
        pixels = self.grid[0] * self.grid[1]
        linear = nn.Linear(in_channels * pixels, self.num_experts * pixels, bias=False)
        bound = (in_channels * pixels) ** -0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, (self.num_experts, *self.grid)))
