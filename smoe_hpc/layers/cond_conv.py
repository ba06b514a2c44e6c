"""A mixture of experts per sample (CondConv, Yang et al. 2019): the sample, not the place, chooses the filters.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.convolution import GridLayer, start_values


class CondConv2d(GridLayer):
    """A convolution whose filters are mixed anew for each sample from N experts.

    The weights of the mixture are the sigmoid of a linear map of the sample's mean over the grid. Filters are mixed
    first and applied once, as one grouped convolution with a group a sample: about N times cheaper than N convolutions.

    Args:
        in_channels: C.
        out_channels: filters.
        grid: (H, W); any grid may enter, this one is only checked against the padding.
        num_experts: N.
        kernel_size: odd.
        padding: "zeros", "periodic_longitude" or "sphere".
        bias: one number a filter and expert, mixed like the filters.
        generator: of the start values.

    Raises:
        ConfigError: fewer than one expert.
    """

    any_grid = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        *,
        num_experts: int = 3,
        kernel_size: int = 3,
        padding: str = "zeros",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, grid, kernel_size=kernel_size, padding=padding)
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts} of CondConv2d must be at least 1")
        self.num_experts = num_experts
        fan_in = in_channels * kernel_size**2
        filters = (num_experts, out_channels, in_channels, kernel_size, kernel_size)
        self.weight = start_values(*filters, fan_in=fan_in, generator=generator)
        self.bias = start_values(num_experts, out_channels, fan_in=fan_in, generator=generator) if bias else None
        self.routing = nn.Linear(in_channels, num_experts)
        bound = 1 / math.sqrt(in_channels)
        with torch.no_grad():
            self.routing.weight.uniform_(-bound, bound, generator=generator)
            self.routing.bias.uniform_(-bound, bound, generator=generator)

    def mixture(self, x: Tensor) -> Tensor:
        """Weights [B, N] in (0, 1) of the experts for the samples ``x`` [B, C, H, W]."""
        return torch.sigmoid(self.routing(x.mean(dim=(2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        padded = self.padded(x)
        batch, (height, width) = len(x), x.shape[2:]
        mixture = self.mixture(x)
        # [B, N] @ [N, out C k k]: the samples' filters, stacked as the groups of one convolution.
        filters = (mixture @ self.weight.flatten(1)).view(batch * self.out_channels, *self.weight.shape[2:])
        bias = None if self.bias is None else (mixture @ self.bias).flatten()
        y = F.conv2d(padded.reshape(1, -1, *padded.shape[2:]), filters, bias, groups=batch)
        return y.view(batch, self.out_channels, height, width)
