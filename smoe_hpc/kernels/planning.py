"""Choosing experts and planning as operations of torch, which a compiler sees as one each, and when a plan is of use.

Dimensions: S choices, B batch, C input channels, N experts, K selected, F filters per expert, H latitude rows, W longitude
columns, P = H W pixels, k kernel size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.cost import input_tile_of, prefers_tiles, region_of
from smoe_hpc.kernels.plan import known_geometry, make_plan
from smoe_hpc.kernels.windows import MOST_EXPERTS, Geometry, plan_geometry, tile_for

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_library = torch.library.Library("smoe_hpc", "FRAGMENT")
_library.define(
    "plan(Tensor index, int num_experts, int height, int width, int batch, int kernel_size, str padding) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define("select(Tensor values, int selected, str expert_order) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def suits_tiles(dtype: torch.dtype, batch: int, weight_shape: Sequence[int], indices_shape: Sequence[int]) -> bool:
    """Whether the tiled kernels are to run this: a type that they have, sizes at which they are the faster form.

    Args:
        dtype: of the input.
        batch: B.
        weight_shape: N, F, C, k, k.
        indices_shape: [B,] K, H, W.
    """
    experts, filters, channels, size, _ = weight_shape
    selected, height, width = indices_shape[-3:]
    if dtype not in _DTYPES or experts > MOST_EXPERTS or not min(batch, *weight_shape, *indices_shape):
        return False
    prefers = prefers_tiles.__wrapped__ if torch.compiler.is_compiling() else prefers_tiles  # compilers see through no cache
    return prefers(dtype, batch, height * width, channels, experts, selected, filters, size**2)


def plan_tensors(
    index: Tensor, num_experts: int, grid: tuple[int, int], batch: int, kernel_size: int, padding: str
) -> list[Tensor]:
    """Tensors of the plan for ``index`` [S, P, K] int32 and a batch; see :func:`smoe_hpc.kernels.plan.make_plan`."""
    if torch.compiler.is_compiling():
        return torch.ops.smoe_hpc.plan.default(index, num_experts, *grid, batch, kernel_size, padding)
    return _plan(index, num_experts, *grid, batch, kernel_size, padding)


def select(values: Tensor, selected: int, expert_order: str) -> Tensor:
    """The choice on a GPU as index [S, P, K] int32, from values [N, H, W] or [S, N, H, W]."""
    if torch.compiler.is_compiling():
        return torch.ops.smoe_hpc.select.default(values, selected, expert_order)
    return _select(values, selected, expert_order)


@functools.lru_cache(maxsize=256)
def geometry_for(
    num_experts: int, selected: int, grid: tuple[int, int], batch: int, kernel_size: int, padding: str, per_sample: bool
) -> Geometry:
    """Where the windows of a layer's plan lie: a function of the sizes alone."""
    tile = tile_for(batch, per_sample)
    return plan_geometry(
        num_experts,
        selected,
        grid,
        batch,
        kernel_size,
        padding,
        per_sample=per_sample,
        tile=tile,
        input_tile=input_tile_of(tile),
        region=region_of(num_experts, selected, grid, tile),
    )


def geometry_of(
    tensors: Sequence[Tensor],
    num_experts: int,
    selected: int,
    grid: tuple[int, int],
    batch: int,
    kernel_size: int,
    padding: str,
    per_sample: bool,
) -> Geometry:
    """The geometry that a plan's tensors were made for: that of :func:`geometry_for`, or one with other windows.

    Raises:
        ConfigError: tensors of a plan for other sizes.
    """
    usual = geometry_for(num_experts, selected, grid, batch, kernel_size, padding, per_sample)
    known = known_geometry(tensors)
    if known is usual:
        return usual
    if known is None:  # made in a graph: its sizes have to tell
        fits = [tuple(t.shape) for t in tensors] == [shape for shape, _ in usual.shapes()]
    else:
        fits = replace(known, tile=usual.tile, input_tile=usual.input_tile, region=usual.region) == usual
    if fits:
        return known or usual
    raise ConfigError(
        f"the plan is not for {selected} of {num_experts} experts on grid {grid[0]}x{grid[1]} with a kernel of "
        f"{kernel_size} and padding {padding!r}; make it for the same sizes, or pass none"
    )


def _select(values: Tensor, selected: int, expert_order: str) -> Tensor:
    from smoe_hpc.kernels.cuda.selection import select_cuda

    return select_cuda(values, selected, expert_order)


def _fake_select(values: Tensor, selected: int, expert_order: str) -> Tensor:
    choices = values.shape[0] if values.dim() == 4 else 1
    return values.new_empty((choices, values.shape[-2] * values.shape[-1], selected), dtype=torch.int32)


def _plan(index: Tensor, num_experts: int, height: int, width: int, batch: int, kernel_size: int, padding: str) -> list[Tensor]:
    geometry = _geometry_of_index(index, num_experts, height, width, batch, kernel_size, padding)
    return make_plan(index, geometry).tensors()


def _fake_plan(
    index: Tensor, num_experts: int, height: int, width: int, batch: int, kernel_size: int, padding: str
) -> list[Tensor]:
    geometry = _geometry_of_index(index, num_experts, height, width, batch, kernel_size, padding)
    return [index.new_empty(shape, dtype=dtype) for shape, dtype in geometry.shapes()]


def _geometry_of_index(
    index: Tensor, num_experts: int, height: int, width: int, batch: int, kernel_size: int, padding: str
) -> Geometry:
    per_sample = index.shape[0] > 1
    return geometry_for(num_experts, int(index.shape[-1]), (height, width), batch, kernel_size, padding, per_sample)


for _name, _form, _fake in (("plan", _plan, _fake_plan), ("select", _select, _fake_select)):
    _library.impl(_name, _form, "CUDA")
    torch.library.register_fake(f"smoe_hpc::{_name}", _fake, lib=_library)
