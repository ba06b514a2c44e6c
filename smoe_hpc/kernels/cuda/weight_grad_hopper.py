"""The expert convolution's weight gradient on Hopper GPUs, bfloat16 and float16: ``weight_grad_hopper.cu``.

C and K F have to be multiples of 8; a kernel has one tap or nine. Sums are float32. What an expert gets from each region of
pixels is added either as it comes, in another order in every run, or by number of the region, at the cost of a workspace.

Dimensions: B batch, C input channels, H, W input rows and columns, Ho, Wo of the output, N experts, K selected, F filters per
expert, k kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.hopper import task
from smoe_hpc.kernels.cuda.library import call
from smoe_hpc.kernels.plan import Geometry, Plan

_MOST_BYTES = 512 << 20  # of a workspace, but for what a single region needs; more regions are worked off in rounds


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
    dw = x.new_empty(shape, dtype=torch.float32)
    workspace, bytes_ = None, 0
    if deterministic:
        bytes_ = workspace_bytes(geometry, num_filters, x.shape[-1])
        workspace = x.new_empty(bytes_, dtype=torch.uint8)
    arguments = task(x.shape[0], dw, plan.weight_grad, geometry.tile, geometry, x)
    call("smoe_weight_grad_hopper", x, g, dw, workspace, bytes_, *arguments)
    return dw


def workspace_bytes(geometry: Geometry, num_filters: int, channels: int) -> int:
    """Memory that ordered sums need; struct Ordered of ``weight_grad_ordered.cuh``."""
    family = geometry.families[2]
    regions = geometry.choices * family.tiles[0] * family.tiles[1]
    longest = family.capacity(geometry.num_experts, geometry.selected) * num_filters
    row = geometry.kernel_size**2 * channels * 4
    head = -(-(regions * 8 + (regions + 2) * 4 + geometry.num_experts * regions * 2) // 256) * 256
    return head + longest * row + max(longest * row, min(regions * longest * row, _MOST_BYTES))
