"""The operations written out plainly: the reference that every faster implementation is tested against.

Slow on purpose: loops over pixels, labels as a full tensor, quantiles by sorting.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels.padding import pad


def expert_conv2d_loop(x: Tensor, weight: Tensor, indices: Tensor, *, padding: str = "zeros") -> Tensor:
    """:func:`smoe_hpc.kernels.expert_conv2d` as a loop over samples, pixels and selections."""
    batch, _, height, width = x.shape
    selected, filters, size = indices.shape[-3], weight.shape[1], weight.shape[-1]
    indices = indices.expand(batch, -1, -1, -1)
    padded = pad(x, size, padding)
    rows = []
    for b in range(batch):
        for k in range(selected):
            for f in range(filters):
                for i in range(height):
                    for j in range(width):
                        patch = padded[b, :, i : i + size, j : j + size]
                        rows.append((patch * weight[indices[b, k, i, j], f]).sum())
    return torch.stack(rows).view(batch, selected * filters, height, width)


def correct_selections(
    grad: Tensor,
    *,
    quantile: float,
    tolerance: float,
    filters: int = 1,
    scale: float = 1.0,
    divisor: Tensor | None = None,
) -> Tensor:
    """[B, K, H, W] of True where a selection's error is at most the sample's quantile plus the tolerance.

    ``grad`` [B, K F, H, W] is dL/dy (times the output before weighting, where weighted), ``scale`` what L was multiplied by.
    """
    errors = grad.abs().unflatten(1, (-1, filters)).mean(2) * (grad.numel() / 2) / scale
    if divisor is not None:
        errors = errors / divisor
    limits = [torch.quantile(sample.flatten(), quantile) for sample in errors]
    return torch.stack([sample <= limit + tolerance for sample, limit in zip(errors, limits, strict=True)])


def labels_of(correct: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Labels [B, N, H, W] of the routing classification: see :mod:`smoe_hpc.kernels.routing_loss.attach`."""
    batch, selected = correct.shape[:2]
    wrong = (~correct).sum(1, keepdim=True).double() / (num_experts - selected)
    labels = wrong.expand(-1, num_experts, -1, -1).clone()
    return labels.scatter_(1, indices.expand(batch, -1, -1, -1), correct.double())


def routing_loss(values: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy with logits between values [N, H, W] or [B, N, H, W] and labels [B, N, H, W]; 0-d."""
    return F.binary_cross_entropy_with_logits(values.expand(labels.shape), labels.to(values.dtype))
