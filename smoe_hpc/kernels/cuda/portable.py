"""The expert convolution on every GPU from compute capability 8.0 on, for every shape: bindings of ``csrc/cuda/portable``.

bfloat16 and float16 run on the matrix unit with float32 sums; float32 is exact float32, without TF32.

Dimensions: B batch, C input channels, H, W input rows and columns, Ho, Wo of the output, N experts, K selected, F filters per
expert, k kernel size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.library import call
from smoe_hpc.kernels.cuda.task import make_task
from smoe_hpc.kernels.planning.plan import Plan


def forward(x: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """The selected experts' filters applied to the input.

    Args:
        x: [B, H, W, C], contiguous.
        weights: [N F, k k, C], contiguous, of the dtype of ``x``.
        plan: of the routing, for this batch.

    Returns:
        y [B, Ho, Wo, K F].

    Raises:
        Unsupported: a dtype or a tile that the kernel does not have.
    """
    geometry = plan.geometry
    filters = weights.shape[0] // geometry.num_experts
    y = x.new_empty(x.shape[0], *geometry.grid, geometry.selected * filters)
    call("smoe_forward_portable", x, weights, y, *make_task(x, weights.shape, plan.forward, geometry.tile, geometry))
    return y


def input_grad(g: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Gradient of the input, dx [B, H, W, C], from that of the output.

    Args:
        g: [B, Ho, Wo, K F], contiguous.
        weights, plan: as in :func:`forward`.

    Raises:
        Unsupported: a dtype or a tile that the kernel does not have.
    """
    geometry = plan.geometry
    dx = g.new_empty(g.shape[0], *geometry.input_grid, weights.shape[2])
    task = make_task(g, weights.shape, plan.input_grad, geometry.input_tile, geometry)
    call("smoe_input_grad_portable", g, weights, dx, *task)
    return dx


def weight_grad(x: Tensor, g: Tensor, shape: torch.Size, plan: Plan, *, ordered: bool) -> Tensor:
    """Gradient of the weights, dw [N F, k k, C], float32.

    Args:
        x, g, plan: as in :func:`forward` and :func:`input_grad`.
        shape: of the weights, (N F, k k, C).
        ordered: add in one order, the same bits at every run; otherwise by atomic additions.

    Raises:
        Unsupported: a dtype or a tile that the kernel does not have.
    """
    geometry = plan.geometry
    dw = torch.empty(shape, dtype=torch.float32, device=x.device)
    task = make_task(x, shape, plan.weight_grad, geometry.tile, geometry)
    size = ctypes.c_int64(0)
    with torch.cuda.device(x.device):
        call("smoe_weight_grad_portable_workspace", ctypes.byref(size), *task, int(ordered))
    workspace = torch.empty(size.value, dtype=torch.uint8, device=x.device)
    call("smoe_weight_grad_portable", x, g, dw, *task, workspace, size.value, int(ordered))
    return dw
