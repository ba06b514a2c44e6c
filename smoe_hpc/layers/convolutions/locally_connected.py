"""A locally connected layer (LCN): every cell has filters of its own.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, P pixels, k kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smoe_hpc.layers.convolutions.grid_layer import GridLayer

FEW_CHANNELS = 32
"""In times out channels up to which shifted products beat a matrix product a pixel.

Forward and backward on one CPU core, 64 x 64 cells and a batch of 32: 7 and 4 times faster at 1 -> 4 and 4 -> 1;
33 x 49 cells: 1.7 times faster at 4 -> 4, but 1.5 times slower at 3 -> 16 and 6 times at 16 -> 16.
"""


def locally_connected(padded: Tensor, weight: Tensor) -> Tensor:
    """Apply to each pixel its own filters.

    Args:
        padded: [B, C, H + k - 1, W + k - 1].
        weight: [out, C, k, k, H, W].

    Returns:
        [B, out, H, W].
    """
    out, channels, k, _, height, width = weight.shape
    if out * channels <= FEW_CHANNELS:
        return _by_shifts(padded, weight)
    patches = padded.permute(2, 3, 0, 1).unfold(0, k, 1).unfold(1, k, 1)  # [H, W, B, C, k, k]
    filters = weight.permute(4, 5, 1, 2, 3, 0).reshape(height * width, channels * k * k, out)
    y = torch.bmm(patches.reshape(height * width, -1, channels * k * k), filters)  # [P, B, out]
    return y.view(height, width, -1, out).permute(2, 3, 0, 1)


def _by_shifts(padded: Tensor, weight: Tensor) -> Tensor:
    """The same as a sum of products of shifted fields and maps: no copy of patches is made or kept."""
    _, channels, k, _, height, width = weight.shape
    y: Tensor | None = None
    for c in range(channels):
        for i in range(k):
            for j in range(k):
                shifted = padded[:, c : c + 1, i : i + height, j : j + width]
                taps = weight[:, c, i, j]
                y = shifted * taps if y is None else torch.addcmul(y, shifted, taps)
    assert y is not None
    return y


class LocallyConnected2d(GridLayer):
    """One filter a pixel and output channel: as flexible as can be, and the most parameters.

    Args:
        in_channels: C.
        out_channels: filters at each pixel.
        grid: (H, W) of the pixels; no other may enter.
        kernel_size: odd.
        padding: "zeros", "periodic_longitude" or "sphere".
        bias: one number a pixel and output channel.
        generator: of the start values, U(-b, b) with b = 1 / sqrt(C k k).
    """

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
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size, *self.grid))
        self.bias = nn.Parameter(torch.empty(out_channels, *self.grid)) if bias else None
        self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        y = locally_connected(self.padded(x), self.weight)
        return y if self.bias is None else y + self.bias
