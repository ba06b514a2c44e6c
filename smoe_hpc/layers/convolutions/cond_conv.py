"""A mixture of experts per sample (CondConv, Yang et al. 2019): the sample, not the pixel, chooses the filters.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.convolutions.grid_layer import GridLayer, start_values


class CondConv2d(GridLayer):
    """A convolution whose filters are mixed for each sample from N experts.

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
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels)) if bias else None
        self.reset_parameters(generator)
        self.routing = nn.Linear(in_channels, num_experts)
        for parameter in self.routing.parameters():
            start_values(parameter, in_channels, generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new filters and biases; the mixture's weights belong to a module of their own."""
        super().reset_parameters(generator)

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
