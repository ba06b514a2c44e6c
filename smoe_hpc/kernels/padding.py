"""How a convolution sees beyond the edge of the grid.

Dimensions: B batch, C channels, H latitude rows, W longitude columns, r = kernel_size // 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.errors import ConfigError

PADDINGS = ("zeros", "periodic_longitude", "sphere")


def check_padding(padding: str, grid: tuple[int, int], kernel_size: int) -> None:
    """Refuse a padding that this grid cannot have.

    Raises:
        ConfigError: an unknown name, an even kernel, or a grid too small or too odd to wrap.
    """
    height, width = grid
    reach = kernel_size // 2
    if padding not in PADDINGS:
        raise ConfigError(f"padding={padding!r} is not known; choose one of {', '.join(PADDINGS)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size={kernel_size} has no centre; use an odd size such as 3")
    if padding != "zeros" and width < reach:
        raise ConfigError(f"padding={padding!r} wraps {reach} columns but the grid has {width}; use padding='zeros'")
    if padding == "sphere" and (width % 2 or height < reach):
        raise ConfigError(
            f"padding='sphere' continues half a turn away: grid {height}x{width} needs an even number of columns and at "
            f"least {reach} rows; use padding='periodic_longitude'"
        )


def pad(x: Tensor, kernel_size: int, padding: str) -> Tensor:
    """Add ``kernel_size // 2`` rows and columns on every side.

    Args:
        x: [B, C, H, W], rows in the order of latitude (either way), columns in the order of longitude.
        kernel_size: odd.
        padding: "zeros"; "periodic_longitude" (columns wrap, zeros beyond the poles: R&T 2021); "sphere" (columns wrap,
            and a row beyond a pole is the row as far on this side of it, half a turn away; cell centres do not lie on
            the pole itself).

    Returns:
        [B, C, H + 2r, W + 2r].
    """
    r = kernel_size // 2
    if r == 0:
        return x
    if padding == "zeros":
        return F.pad(x, (r, r, r, r))
    if padding == "sphere":
        half = x.shape[-1] // 2
        south, north = (edge.flip(-2).roll(half, -1) for edge in (x[..., :r, :], x[..., -r:, :]))
        over = torch.cat([south, x, north], dim=-2)
        return torch.cat([over[..., -r:], over, over[..., :r]], dim=-1)
    wrapped = torch.cat([x[..., -r:], x, x[..., :r]], dim=-1)
    return F.pad(wrapped, (0, 0, r, r))
