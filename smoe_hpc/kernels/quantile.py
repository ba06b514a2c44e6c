"""Quantiles of the rows of a matrix by selection, without sorting them.

Dimensions: B rows, M entries of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_quantiles(rows: Tensor, quantile: float) -> Tensor:
    """The ``quantile`` of each row, interpolated linearly between neighbours as ``torch.quantile`` does.

    Args:
        rows: [B, M], floating point. A row with a NaN has a NaN quantile.
        quantile: between 0 and 1.

    Returns:
        [B], of the dtype of ``rows``.
    """
    size = rows.shape[1]
    position = quantile * (size - 1)
    below = math.floor(position)
    share = position - below
    low = rows.kthvalue(below + 1, dim=1).values
    if share:
        # The next value in order: the smallest one above, unless equals of `low` fill its place too.
        at_most = (rows <= low[:, None]).sum(1)
        above = rows.masked_fill(rows <= low[:, None], math.inf).amin(1)
        high = torch.where(at_most >= below + 2, low, above)
        # Written as torch.lerp does, from the nearer end, so that both agree to the last bit.
        between = low + share * (high - low) if share < 0.5 else high - (high - low) * (1.0 - share)
        low = torch.where(high.isinf(), high, between)
    return torch.where(rows.isnan().any(1), math.nan, low)
