"""The arguments that all kernels of the expert convolution have in common."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.planning.geometry import Geometry
from smoe_hpc.kernels.planning.plan import Windows
from smoe_hpc.kernels.planning.tiles import Tile

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type of common.cuh
HALF_TYPES = (torch.bfloat16, torch.float16)


def make_task(
    like: torch.Tensor,
    weight_shape: Sequence[int],
    windows: Windows,
    tile: Tile,
    geometry: Geometry,
    dtypes: Sequence[torch.dtype] = tuple(TYPES),
) -> tuple[object, ...]:
    """Sizes, windows, tile, choices, type, multiprocessors.

    Args:
        like: x or g, [B, ...]; its dtype is the kernel's.
        weight_shape: of the packed weights, N F, k k, C.
        windows, tile: those that the kernel works on.
        geometry: of the plan.
        dtypes: those that the kernel has.

    Raises:
        Unsupported: another dtype.
    """
    if like.dtype not in dtypes:
        raise Unsupported(f"no kernel of this kind for {like.dtype}")
    rows, _, channels = weight_shape
    shape = library.Shape(
        like.shape[0],
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
        windows.experts,
        windows.masks,
        windows.slots,
        *windows.tiles,
        *windows.step,
        windows.first,
        *windows.size,
        windows.capacity,
    )
    of_tile = library.Tile(tile.rows, tile.columns, tile.batch)
    sizes = (ctypes.byref(shape), ctypes.byref(listed), ctypes.byref(of_tile))
    return (*sizes, geometry.choices, TYPES[like.dtype], _processors(like.get_device()))


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
