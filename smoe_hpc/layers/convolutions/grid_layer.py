"""The base of every layer on a grid: arguments, start values and the check of its input.

The layers of the paper's table take the same arguments and give the same shape, so that one can stand where another
stood: ``Layer(in_channels, out_channels, grid, *, kernel_size=3, padding="zeros", bias=True, generator=None)`` maps
[B, C, H, W] to [B, out, H, W].

Dimensions: B batch, C input channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.padding import check_padding, pad
from smoe_hpc.layers.moving import Move, of_any_rank


def start_values(parameter: nn.Parameter, fan_in: int, generator: torch.Generator | None) -> None:
    """Draw a parameter from U(-b, b), b = 1 / sqrt(fan_in): where ``torch.nn.Conv2d`` starts its filters."""
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        parameter.uniform_(-bound, bound, generator=None if parameter.is_meta else generator)


class GridLayer(nn.Module):
    """Arguments of a layer on a grid, checked once; and the check of what enters it.

    Raises:
        ConfigError: channels or a grid that are not positive, or a padding that the grid cannot have.
    """

    any_grid = False
    """True where the parameters do not depend on the grid, so that another one may enter."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        *,
        kernel_size: int = 3,
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, "out_channels": out_channels}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} of {type(self).__name__} must be at least 1")
        if len(grid) != 2 or min(grid) < 1:
            raise ConfigError(f"grid={grid} must be (rows, columns), both at least 1, e.g. (32, 64)")
        check_padding(padding, (grid[0], grid[1]), kernel_size)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.grid = (int(grid[0]), int(grid[1]))
        self.kernel_size, self.padding = kernel_size, padding

    @property
    def fan_in(self) -> int:
        """How many weights an output value is a sum over."""
        return self.in_channels * self.kernel_size**2

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new filters and biases."""
        for name in ("weight", "bias"):
            parameter = getattr(self, name, None)
            if parameter is not None:
                start_values(parameter, self.fan_in, generator)

    def _apply(self, fn: Move, recurse: bool = True) -> GridLayer:
        super()._apply(of_any_rank(fn), recurse)
        return self

    def padded(self, x: Tensor) -> Tensor:
        """Check ``x`` [B, C, H, W] and pad it on every side.

        Raises:
            ConfigError: not four dimensions, other channels, or another grid than the layer was made for.
        """
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ConfigError(
                f"{name} was given shape {tuple(x.shape)} but takes [batch, {self.in_channels}, rows, columns]; "
                f"make it with in_channels={x.shape[1] if x.dim() == 4 else '...'} or reshape the input"
            )
        grid = (int(x.shape[2]), int(x.shape[3]))
        if grid != self.grid:
            if not self.any_grid:
                raise ConfigError(
                    f"{name} was made for grid {self.grid} but the input has {grid}; its parameters belong to pixels: "
                    "make a new layer for the other grid or regrid the data"
                )
            check_padding(self.padding, grid, self.kernel_size)
        return pad(x, self.kernel_size, self.padding)

    def extra_repr(self) -> str:
        """Arguments as ``print(model)`` shows them."""
        return (
            f"{self.in_channels}, {self.out_channels}, grid={self.grid}, kernel_size={self.kernel_size}, "
            f"padding={self.padding!r}"
        )
