"""The plans of one choice of experts, kept until the choice changes.

Dimensions: S choices, B batch, C input channels, N experts, K selected, F filters per expert, H latitude rows, W longitude
columns, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.planning.cost import suits_tiles
from smoe_hpc.kernels.planning.making import plan_tensors, to_index
from smoe_hpc.kernels.planning.tiles import tile_for

Plans = dict[tuple[object, ...], list[Tensor]]  # by what a plan depends on beside the choice
_read_by_graphs: dict[int, tuple[Plans, Tensor]] = {}  # a graph holds bare addresses, and may be replayed at any time


def kept_plan(
    plans: Plans,
    choice: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    batch: int,
    weight_shape: Sequence[int],
    padding: str,
) -> list[Tensor]:
    """Tensors of a choice's plan, or nothing where no kernel uses one; see :meth:`smoe_hpc.kernels.Routing.plan`.

    Args:
        plans: those of this choice that there are; a new one is added.
        choice: [K, H, W] or [B, K, H, W].
        num_experts: N.
        dtype, batch, weight_shape, padding: of the layer.
    """
    if not (choice.is_cuda and suits_tiles(dtype, batch, weight_shape, choice.shape)):
        return []
    if not library.available(choice.device):
        return []
    kernel_size = weight_shape[-1]
    if torch.compiler.is_compiling():  # a compiled graph's memory is its own: nothing of it is kept
        return _make(choice, num_experts, batch, kernel_size, padding)
    key: tuple[object, ...] = (tile_for(batch, per_sample=choice.dim() == 4), kernel_size, padding)
    capture = library.capture_of(choice.device)
    if capture and key in plans:
        _read_by_graphs[id(plans)] = (plans, choice)
    elif capture:  # a CUDA graph writes its plan at replay: only what is captured with it can read that
        key = (*key, capture)
    if key not in plans:
        with torch.inference_mode(False):
            plans[key] = _make(choice, num_experts, batch, kernel_size, padding)
    return plans[key]


def _make(choice: Tensor, num_experts: int, batch: int, kernel_size: int, padding: str) -> list[Tensor]:
    grid = (int(choice.shape[-2]), int(choice.shape[-1]))
    with torch.no_grad():
        return plan_tensors(to_index(choice), num_experts, grid, batch, kernel_size, padding)
