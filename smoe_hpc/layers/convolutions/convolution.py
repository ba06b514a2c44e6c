"""One filter everywhere, with the paddings of the sphere.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.layers.convolutions.grid_layer import GridLayer


class ChannelBias(nn.Module):
    """Add one learned number to each channel: what a layer without a bias of its own is followed by.

    Args:
        channels: of the input [B, channels, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from zeros."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        return x + self.bias[:, None, None]


class Conv2d(GridLayer):
    """A convolution with the paddings of the sphere: one filter everywhere.

    Args:
        in_channels: C.
        out_channels: filters.
        grid: (H, W); any grid may enter, this one is only checked against the padding.
        kernel_size: odd.
        padding: "zeros", "periodic_longitude" or "sphere".
        bias: one number a filter.
        generator: of the start values, U(-b, b) with b = 1 / sqrt(C k k).
    """

    any_grid = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        *,
        kernel_size: int = 3,
        padding: str = "zeros",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, grid, kernel_size=kernel_size, padding=padding)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        return F.conv2d(self.padded(x), self.weight, self.bias)
