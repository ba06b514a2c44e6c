"""Selecting experts on a CUDA device: bindings of ``csrc/cuda/select``.

Dimensions: S choices (1, or B), N experts, K selected, H latitude rows, W longitude columns, P = H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.library import call

MOST_EXPERTS = 65535
_MOST_RANKED = 16384


def can_select(num_experts: int, selected: int, expert_order: str) -> bool:
    """Whether the kernel does these sizes: up to 65535 experts, and up to 16384 selected best first."""
    return num_experts <= MOST_EXPERTS and (selected <= _MOST_RANKED or expert_order == "id")


def select_cuda(values: Tensor, selected: int, expert_order: str) -> Tensor:
    """The choice that :func:`smoe_hpc.kernels.select_experts` makes, in one read of the values.

    Args:
        values: [N, H, W] or [S, N, H, W], float32 after conversion, sizes as :func:`can_select` has them.
        selected: K, at most N.
        expert_order: "rank" or "id".

    Returns:
        index [S, P, K] int32.
    """
    values = values.detach().to(torch.float32).contiguous()
    num_experts, height, width = values.shape[-3:]
    choices, pixels = values.shape[0] if values.dim() == 4 else 1, height * width
    index = torch.empty(choices, pixels, selected, dtype=torch.int32, device=values.device)
    call("smoe_select", values, choices, num_experts, pixels, selected, int(expert_order == "rank"), index)
    return index
