"""A convolution that also reads the coordinates of each pixel (CoordConv, Liu et al. 2018).

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, D coordinate channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.kernels.padding import pad
from smoe_hpc.layers.convolutions.grid_layer import GridLayer
from smoe_hpc.layers.moving import Move


def coordinate_channels(grid: tuple[int, int], padding: str, device: str | None = None) -> Tensor:
    """Where each cell lies, as channels between -1 and 1.

    Rows run from -1 (first) to 1 (last). With zero padding columns do likewise. Where longitude wraps, a ramp would
    jump at the seam, which is nowhere special: columns are then given by the sine and cosine of the longitude.

    Args:
        grid: (H, W).
        padding: of the layer that reads them.
        device: None: torch's default.

    Returns:
        [D, H, W], D = 2 with "zeros", else 3.
    """
    height, width = grid
    rows = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    if padding == "zeros":
        return torch.stack([rows, torch.linspace(-1, 1, width, device=device).expand(height, width)])
    turn = torch.arange(width, dtype=torch.float64, device=device) * (2 * math.pi / width)
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
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels + len(coordinates), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters(generator)
        self.register_buffer("coordinates", pad(coordinates[None], kernel_size, padding), persistent=False)

    @property
    def fan_in(self) -> int:
        """Of the input's channels and the coordinates."""
        return self.weight.shape[1] * self.kernel_size**2

    def _apply(self, fn: Move, recurse: bool = True) -> GridLayer:
        super()._apply(fn, recurse)
        self._renew_coordinates(self.coordinates.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.coordinates.is_meta and not self.weight.is_meta:  # assign=True, which leaves what is not in the dict
            self._renew_coordinates(self.weight.device)

    def _renew_coordinates(self, device: torch.device) -> None:
        dtype = torch.float64 if self.coordinates.dtype == torch.float64 else torch.float32
        coordinates = coordinate_channels(self.grid, self.padding, "cpu").to(device, dtype)
        self.coordinates = pad(coordinates[None], self.kernel_size, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        of_input, of_grid = self.weight.split([self.in_channels, self.coordinates.shape[1]], dim=1)
        of_coordinates = F.conv2d(self.coordinates.to(self.weight.dtype), of_grid, self.bias)
        return F.conv2d(self.padded(x), of_input) + of_coordinates
