"""The expert convolution and its gradients on Hopper GPUs (compute capability 9.0), bfloat16 and float16: bindings of
``csrc/cuda/hopper``.

C and K F have to be multiples of 8; the gradients take kernels of one tap or nine. Sums are float32, rounded once; the
forward's are added in the order of the portable kernel's. What an expert gets from each region of pixels is added to the
weight gradient either as it comes, in another order in every run, or by number of the region, at the cost of a workspace.

Dimensions: B batch, C input channels, H, W input rows and columns, Ho, Wo of the output, N experts, K selected, F filters per
expert, k kernel size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.library import call
from smoe_hpc.kernels.cuda.task import HALF_TYPES, make_task
from smoe_hpc.kernels.planning.geometry import Geometry
from smoe_hpc.kernels.planning.plan import Plan

_MOST_BYTES = 512 << 20  # of a workspace, but for what a single region needs; more regions are worked off in rounds


def forward(x: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """The selected experts' filters applied to the input.

    Args:
        x: [B, H, W, C], contiguous, 16-byte aligned.
        weights: [N F, k k, C], contiguous, 16-byte aligned, of the dtype of ``x``.
        plan: of the routing, for this batch.

    Returns:
        y [B, Ho, Wo, K F].

    Raises:
        Unsupported: another GPU, or a dtype, a number of channels, an alignment or a tile that the kernel does not have.
    """
    geometry = plan.geometry
    filters = weights.shape[0] // geometry.num_experts
    y = x.new_empty(x.shape[0], *geometry.grid, geometry.selected * filters)
    task = make_task(x, weights.shape, plan.forward, geometry.tile, geometry, HALF_TYPES)
    call("smoe_forward_hopper", x, weights, y, *task)
    return y


def input_grad(g: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """The gradient that reaches the input.

    A gradient that is not finite reaches the inputs it belongs to and no others. A weight that is not finite may also reach
    the pixels near those that select its expert.

    Args:
        g: [B, Ho, Wo, K F], contiguous, 16-byte aligned.
        weights: [N F, k k, C], contiguous, 16-byte aligned, of the dtype of ``g``.
        plan: of the routing, for this batch. The selections of a pixel must differ from one another.

    Returns:
        [B, H, W, C].

    Raises:
        Unsupported: another GPU, or a dtype, a number of channels, a kernel size, an alignment or a tile that the kernel does
            not have.
    """
    geometry = plan.geometry
    dx = g.new_empty(g.shape[0], *geometry.input_grid, weights.shape[-1])
    task = make_task(g, weights.shape, plan.input_grad, geometry.input_tile, geometry, HALF_TYPES)
    call("smoe_input_grad_hopper", g, weights, dx, *task)
    return dx


def weight_grad(x: Tensor, g: Tensor, plan: Plan, num_filters: int, *, deterministic: bool) -> Tensor:
    """The gradient of the packed weights.

    A gradient that is not finite reaches the expert it belongs to and no other. An input that is not finite reaches the
    experts of its pixel's neighbours, and may reach others that the same region lists.

    Args:
        x: [B, H, W, C], contiguous, 16-byte aligned.
        g: [B, Ho, Wo, K F], contiguous, 16-byte aligned, of the dtype of ``x``.
        plan: of the routing, for this batch. The selections of a pixel must differ from one another.
        num_filters: F.
        deterministic: the same bits in every run.

    Returns:
        [N F, k k, C] float32; zero for experts that no pixel selects.

    Raises:
        Unsupported: another GPU, or a dtype, a number of channels, a kernel size, an alignment or a region that the kernel does
            not have.
    """
    geometry = plan.geometry
    shape = (geometry.num_experts * num_filters, geometry.kernel_size**2, x.shape[-1])
    numbers = math.prod(shape)
    dw = x.new_empty(numbers + 4, dtype=torch.float32)  # the kernel counts in the last ones
    workspace, bytes_ = None, 0
    if deterministic:
        bytes_ = workspace_bytes(geometry, num_filters, x.shape[-1])
        workspace = x.new_empty(bytes_, dtype=torch.uint8)
    task = make_task(x, shape, plan.weight_grad, geometry.tile, geometry, HALF_TYPES)
    call("smoe_weight_grad_hopper", x, g, dw, workspace, bytes_, *task)
    return dw[:numbers].view(shape)


def workspace_bytes(geometry: Geometry, num_filters: int, channels: int) -> int:
    """Memory that ordered sums need; struct Ordered of ``hopper/weight_grad/ordered.cuh``."""
    family = geometry.families[2]
    regions = geometry.choices * family.tiles[0] * family.tiles[1]
    longest = family.capacity(geometry.num_experts, geometry.selected) * num_filters
    row = geometry.kernel_size**2 * channels * 4
    head = -(-(regions * 8 + (regions + 2) * 4 + regions * 4 + geometry.num_experts * regions * 2) // 256) * 256
    return head + longest * row + max(longest * row, min(regions * longest * row, _MOST_BYTES))
