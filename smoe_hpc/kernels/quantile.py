"""Quantiles of the rows of a matrix by selection, without sorting them: on a CUDA device by histograms of their bits.

Dimensions: B rows, M entries of a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.cuda import routing_loss as cuda
from smoe_hpc.kernels.cuda.library import Unsupported


def row_quantiles(rows: Tensor, quantile: float) -> Tensor:
    """The ``quantile`` of each row, interpolated linearly between neighbours as ``torch.quantile`` does.

    Args:
        rows: [B, M], floating point, M at least 1. A row with a NaN has a NaN quantile.
        quantile: between 0 and 1.

    Returns:
        [B], of the dtype of ``rows``; for one of 16 bits rounded from float32.

    Raises:
        ConfigError: rows of no entries, or a quantile outside 0..1.
    """
    if rows.dim() != 2 or not rows.shape[1]:
        raise ConfigError(f"quantiles of rows {list(rows.shape)}: a row has at least one entry; give [B, M] with M >= 1")
    if not 0.0 <= quantile <= 1.0:
        raise ConfigError(f"quantile={quantile}: a quantile is a share; give a number from 0 to 1")
    if rows.itemsize == 2:
        return row_quantiles(rows.float(), quantile).to(rows.dtype)
    size = rows.shape[1]
    if rows.dtype == torch.float32 and rows.numel() and cuda.serves(rows):
        try:
            return cuda.quantiles_of(rows.detach().contiguous(), (quantile,))[0]
        except Unsupported:
            pass
    position = quantile * (size - 1)
    below = math.floor(position)
    share = position - below
    low, high = _neighbours(rows, below, min(below + 1, size - 1))
    # Written as torch.lerp does, from the nearer end, so that both agree to the last bit.
    between = low + share * (high - low) if share < 0.5 else high - (high - low) * (1.0 - share)
    value = torch.where(high.isinf(), high, between) if share else low
    return torch.where(rows.amax(1).isnan(), math.nan, value)


def _neighbours(rows: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """The entries [B] at two neighbouring indices of each row, sorted."""
    if rows.device.type == "cpu":
        # numpy selects one index with vector instructions, ten times as fast as torch.kthvalue or as two indices at once.
        ordered = np.partition(rows.detach().numpy(), first, axis=1)
        high = ordered[:, second:].min(1) if second > first else ordered[:, first]
        return torch.from_numpy(ordered[:, first]), torch.from_numpy(high)
    low = rows.kthvalue(first + 1, dim=1).values
    if second == first:
        return low, low
    # The next in order: the smallest one above, unless values equal to `low` take its index too.
    beyond = rows > low[:, None]
    next_one = torch.where(beyond, rows, math.inf).amin(1)
    return low, torch.where((~beyond).sum(1) >= second + 1, low, next_one)
