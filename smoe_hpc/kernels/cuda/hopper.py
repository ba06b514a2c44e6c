"""The expert convolution's forward on Hopper GPUs (compute capability 9.0), bfloat16 and float16: ``forward_hopper.cu``.

C and K F have to be multiples of 8; the sums are float32, added in the same order as the portable kernel's.

Dimensions: B batch, C input channels, H, W input rows and columns, Ho, Wo of the output, N experts, K selected, F filters per
expert, k kernel size.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.cuda.library import Unsupported, call
from smoe_hpc.kernels.plan import Geometry, Plan, Windows
from smoe_hpc.kernels.windows import Tile

_TYPES = {torch.bfloat16: 1, torch.float16: 2}  # enum Type of common.cuh


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
    call("smoe_forward_hopper", x, weights, y, *task(x.shape[0], weights, plan.forward, geometry.tile, geometry, x))
    return y


def task(batch: int, weights: Tensor, windows: Windows, tile: Tile, geometry: Geometry, like: Tensor) -> tuple[object, ...]:
    """The arguments that the Hopper kernels have in common: sizes, windows, tile, choices, type, multiprocessors.

    Raises:
        Unsupported: a dtype that they do not have.
    """
    if like.dtype not in _TYPES:
        raise Unsupported(f"no Hopper kernel for {like.dtype}")
    rows, _, channels = weights.shape
    shape = library.Shape(
        batch,
        channels,
        *geometry.input_grid,
        *geometry.grid,
        geometry.num_experts,
        geometry.selected,
        rows // geometry.num_experts,
        geometry.kernel_size,
        geometry.offset,
        int(geometry.wrap),
    )
    listed = library.make_windows(
        windows.counts,
        windows.ids,
        windows.masks,
        windows.slots,
        *windows.tiles,
        *windows.step,
        windows.first,
        *windows.size,
        windows.capacity,
    )
    of_tile = library.Tile(tile.rows, tile.columns, tile.batch)
    places = (ctypes.byref(shape), ctypes.byref(listed), ctypes.byref(of_tile))
    return (*places, geometry.choices, _TYPES[like.dtype], _processors(like.get_device()))


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
