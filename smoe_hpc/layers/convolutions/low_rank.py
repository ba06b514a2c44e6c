"""A low-rank locally connected layer (LRLCN, Elsayed et al. 2020): a few filter banks, mixed at each pixel.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, Q rank (filter banks).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.convolutions.grid_layer import GridLayer, start_values


class LowRankLocallyConnected2d(GridLayer):
    """y = sum over q of w_q(i, j) conv_q(x), plus a bias; w = softmax over q of (row logits + column logits).

    The mixture starts equal everywhere (logits 0). The bias is a row's plus a column's plus a channel's, so that no
    parameter but the filters counts H times W.

    Args:
        in_channels: C.
        out_channels: filters of a bank.
        grid: (H, W) of the mixture; no other may enter.
        rank: Q, banks.
        kernel_size: odd.
        padding: "zeros", "periodic_longitude" or "sphere".
        bias: row [H], column [W] and channel [out] biases, starting at 0.
        generator: of the filters' start values.

    Raises:
        ConfigError: a rank below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        *,
        rank: int = 3,
        kernel_size: int = 3,
        padding: str = "zeros",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, grid, kernel_size=kernel_size, padding=padding)
        if rank < 1:
            raise ConfigError(f"rank={rank} of LowRankLocallyConnected2d must be at least 1")
        height, width = self.grid
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(rank, out_channels, in_channels, kernel_size, kernel_size))
        self.row_logits = nn.Parameter(torch.empty(rank, height, 1))
        self.column_logits = nn.Parameter(torch.empty(rank, 1, width))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
            self.row_bias = nn.Parameter(torch.empty(height))
            self.column_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new filters; everything else starts from zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        start_values(self.weight, self.in_channels * self.kernel_size**2, generator)

    def mixture(self) -> Tensor:
        """Weights [Q, H, W] of the banks at each pixel; they sum to 1."""
        return torch.softmax(self.row_logits + self.column_logits, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        banks = F.conv2d(self.padded(x), self.weight.flatten(0, 1))  # all banks as one convolution
        banks = banks.view(len(x), self.rank, self.out_channels, *self.grid)
        mixture = self.mixture()
        y = banks[:, 0] * mixture[0]
        for q in range(1, self.rank):
            y = torch.addcmul(y, banks[:, q], mixture[q])
        if self.bias is None:
            return y
        return y + (self.bias[:, None, None] + self.row_bias[:, None] + self.column_bias)
