"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for an expert convolution: the experts that were selected.

What kernels compute beside them (a tile of pixels has the experts of all of them) is not counted.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, K selected, F filters per expert, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def flops(x: Shape, weight: Shape, indices: Shape) -> int:
    """2 B H W K F C k k: a product and a sum for each weight of each selected filter at each pixel."""
    batch, channels, height, width = x
    return 2 * batch * height * width * indices[-3] * weight[1] * channels * weight[-1] ** 2


def register() -> None:
    """Tell torch, once the operations are defined."""

    @register_flop_formula(torch.ops.smoe_hpc.expert_conv2d)
    def _forward(x: Shape, weight: Shape, indices: Shape, *rest: Any, **more: Any) -> int:
        return flops(x, weight, indices)

    @register_flop_formula(torch.ops.smoe_hpc.expert_conv2d_backward)
    def _backward(g: Shape, x: Shape, weight: Shape, indices: Shape, *rest: Any, **more: Any) -> int:
        *_, needs_x, needs_weight = rest
        return (needs_x + needs_weight) * flops(x, weight, indices)
