"""A convolution that is told where it stands (CoordConv, Liu et al. 2018).

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, D coordinate channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.kernels.padding import pad
from smoe_hpc.layers.convolution import GridLayer, start_values


def coordinate_channels(grid: tuple[int, int], padding: str) -> Tensor:
    """Where each cell lies, as channels between -1 and 1.

    Rows run from -1 (first) to 1 (last). With zero padding columns do likewise. Where longitude wraps, a ramp would
    jump at the seam, which is no special place: columns are then given by the sine and cosine of the longitude.

    Args:
        grid: (H, W).
        padding: of the layer that reads them.

    Returns:
        [D, H, W], D = 2 with "zeros", else 3.
    """
    height, width = grid
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    if padding == "zeros":
        return torch.stack([rows, torch.linspace(-1, 1, width).expand(height, width)])
    turn = torch.arange(width, dtype=torch.float64) * (2 * math.pi / width)
    around = [f(turn).float().expand(height, width) for f in (torch.sin, torch.cos)]
    return torch.stack([rows, *around])


class CoordConv2d(GridLayer):
    """A convolution over the input and its coordinates.

    The coordinates are the same for every sample, so their share of the output is computed once and added.

    Args:
        in_channels: C, without the coordinates.
        out_channels: filters.
        grid: (H, W) that the coordinates belong to; no other may enter.
        kernel_size: odd.
        padding: "zeros", "periodic_longitude" or "sphere"; the coordinates are padded like the input.
        bias: one number a filter.
        generator: of the start values.
    """

    coordinates: Tensor

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
        coordinates = coordinate_channels(self.grid, padding)
        channels = in_channels + len(coordinates)
        fan_in = channels * kernel_size**2
        self.weight = start_values(out_channels, channels, kernel_size, kernel_size, fan_in=fan_in, generator=generator)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = start_values(out_channels, fan_in=fan_in, generator=generator)
        self.register_buffer("coordinates", pad(coordinates[None], kernel_size, padding), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        of_input, of_place = self.weight.split([self.in_channels, self.coordinates.shape[1]], dim=1)
        place = F.conv2d(self.coordinates.to(self.weight.dtype), of_place, self.bias)
        return F.conv2d(self.padded(x), of_input) + place
