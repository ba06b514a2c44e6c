"""Making a plan from a choice of experts: on a GPU in one launch, elsewhere by torch; one operation for a compiler.

Dimensions: S choices, B batch, N experts, K selected, H latitude rows, W longitude columns, P = H W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.cuda.planning import plan_cuda, to_index_cuda
from smoe_hpc.kernels.planning.geometry import Geometry, geometry_for
from smoe_hpc.kernels.planning.plan import Plan
from smoe_hpc.kernels.planning.reference import plan_reference

_made_for: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of each plan's first tensor: its geometry
_library = torch.library.Library("smoe_hpc", "FRAGMENT")
_library.define(
    "plan(Tensor index, int num_experts, int height, int width, int batch, int kernel_size, str padding) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def to_index(indices: Tensor) -> Tensor:
    """Indices [K, H, W] or [S, K, H, W] as [S, P, K], int32: pixel by pixel, P = H W; no copy where they lie so already."""
    if indices.dtype == torch.int64 and indices.device.type == "cuda":
        with contextlib.suppress(Unsupported):
            return to_index_cuda(indices)
    batched = indices if indices.dim() == 4 else indices[None]
    return batched.flatten(2).transpose(1, 2).to(torch.int32, memory_format=torch.contiguous_format)


def make_plan(index: Tensor, geometry: Geometry) -> Plan:
    """The plan of a choice.

    Args:
        index: [S, P, K] int32 as :func:`to_index` gives it; a selection outside 0..N-1 is left out.
        geometry: as :func:`plan_geometry` gives it.

    Raises:
        ConfigError: an index of another shape or type.
    """
    expected = (geometry.choices, geometry.grid[0] * geometry.grid[1], geometry.selected)
    if tuple(index.shape) != expected or index.dtype != torch.int32:
        raise ConfigError(f"index is {tuple(index.shape)} {index.dtype}, the plan needs {expected} int32; see to_index")
    index = index.contiguous()
    if index.device.type == "cuda":
        with contextlib.suppress(Unsupported):  # no compiler, or windows too large for shared memory
            return _remembered(Plan.from_tensors(geometry, plan_cuda(index, geometry)))
    return _remembered(Plan.from_tensors(geometry, plan_reference(index, geometry)))


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
    known = _made_for.get(tensors[0])  # None: not made by this process, eagerly
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


def _remembered(plan: Plan) -> Plan:
    if not torch.compiler.is_compiling():
        _made_for[plan.forward.counts] = plan.geometry
    return plan


# -- one operation for a compiler ------------------------------------------------------------------------------------------


def plan_tensors(
    index: Tensor, num_experts: int, grid: tuple[int, int], batch: int, kernel_size: int, padding: str
) -> list[Tensor]:
    """Tensors of the plan for ``index`` [S, P, K] int32 and a batch; see :func:`make_plan`."""
    if torch.compiler.is_compiling():
        return torch.ops.smoe_hpc.plan.default(index, num_experts, *grid, batch, kernel_size, padding)
    return _plan(index, num_experts, *grid, batch, kernel_size, padding)


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


_library.impl("plan", _plan, "CUDA")
torch.library.register_fake("smoe_hpc::plan", _fake_plan, lib=_library)
