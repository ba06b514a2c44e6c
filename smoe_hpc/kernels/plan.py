"""The plan of a routing: what the pixels of each window of the grid select, made once for every use of the choice.

The kernels work on windows of neighbouring pixels, which share most of their experts where a gate is smooth. For each
window the plan lists the experts that any of its pixels selects (*columns* of a small dense product) and says for each
selection which column it is. Three kinds of windows serve forward, input gradient and weight gradient:

    forward      a tile of output pixels; experts by number
    input_grad   the output pixels that a tile of input pixels is read from: the tile and a halo of kernel_size - 1. Masks
                 say which taps need an expert: bit ``i * kernel_size + j``, if a pixel selects it that tap (i, j) leads to
    weight_grad  a region of several forward tiles. Masks say which of the tiles select an expert: bit = tile, row-major

Masked lists are sorted so that what a tap or tile does not need lies together: for taps by the number of bits set, most
first, then by mask, then by expert; for tiles by the mask's place in a Gray code, in which neighbours differ in one tile, then
by expert. Kernels of more than 16 taps have all bits set.

A plan is a pure function of the indices: its tensors have sizes fixed by shapes alone, nothing is read back from the device.

Dimensions: S choices (1, or B where each sample has its own), N experts, K selected, H output rows, W output columns,
T windows, U pixels of a window, C capacity of a window's list (N, or its selections if fewer, rounded up to 16).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.plan_reference import plan_reference
from smoe_hpc.kernels.windows import MOST_MASK_BITS, Geometry, Tile, plan_geometry, tile_for

__all__ = [
    "Geometry",
    "Plan",
    "PlanStatistics",
    "Tile",
    "Windows",
    "make_plan",
    "plan_geometry",
    "plan_statistics",
    "tile_for",
    "to_index",
]
_made_for: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of each plan's first tensor: its geometry


@dataclass(frozen=True)
class Windows:
    """One kind of windows: tensors of int32 or int16 (to be read as unsigned), contiguous, all on one device.

    Args:
        counts: [S, T] int32, number of experts a window's pixels select.
        ids: [S, T, C] int32, their numbers; zero beyond the count.
        masks: [S, T, C] int16, which sub-windows select them, a bit each; zero beyond the count. None for forward windows.
        slots: [S, T, U, K] int16, place in ``ids`` of each pixel's k-th selection; 0xffff outside the map.
        tiles: windows in a column and in a row of the grid; T is their product.
        step: rows and columns from one window's first pixel to the next one's.
        first: row and column of the first window's first pixel (0, or negative).
        size: rows and columns of a window; U is their product.
    """

    counts: Tensor
    ids: Tensor
    masks: Tensor | None
    slots: Tensor
    tiles: tuple[int, int]
    step: tuple[int, int]
    first: int
    size: tuple[int, int]

    @property
    def capacity(self) -> int:
        """C, the most experts a window can list."""
        return self.ids.shape[-1]

    def tensors(self) -> list[Tensor]:
        """What of it are tensors, in the order of the fields."""
        return [t for t in (self.counts, self.ids, self.masks, self.slots) if t is not None]


@dataclass(frozen=True)
class Plan:
    """The windows of a routing and where they lie."""

    geometry: Geometry
    forward: Windows
    input_grad: Windows
    weight_grad: Windows

    def tensors(self) -> list[Tensor]:
        """Eleven tensors: counts, ids, masks (but forward's), slots of each kind."""
        return [*self.forward.tensors(), *self.input_grad.tensors(), *self.weight_grad.tensors()]

    @staticmethod
    def from_tensors(geometry: Geometry, tensors: list[Tensor]) -> Plan:
        """The plan whose :meth:`tensors` these are."""
        rest = iter(tensors)
        windows = []
        for family in geometry.families:
            counts, ids = next(rest), next(rest)
            masks = next(rest) if family.masked else None
            windows.append(Windows(counts, ids, masks, next(rest), family.tiles, family.step, family.first, family.size))
        return Plan(geometry, *windows)

    def num_bytes(self) -> int:
        """Memory of its tensors."""
        return self.geometry.num_bytes()


def to_index(indices: Tensor) -> Tensor:
    """Indices [K, H, W] or [S, K, H, W] as [S, P, K], int32: pixel by pixel, P = H W; no copy where they lie so already."""
    if indices.dtype == torch.int64 and indices.device.type == "cuda":
        from smoe_hpc.kernels.cuda.planning import Unsupported, to_index_cuda

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
        from smoe_hpc.kernels.cuda.planning import Unsupported, plan_cuda

        with contextlib.suppress(Unsupported):  # no compiler, or windows too large for shared memory
            return _remembered(Plan.from_tensors(geometry, plan_cuda(index, geometry)))
    return _remembered(Plan.from_tensors(geometry, plan_reference(index, geometry)))


def known_geometry(tensors: Sequence[Tensor]) -> Geometry | None:
    """What a plan with these tensors was made for; None where it was not made by this process, eagerly."""
    return _made_for.get(tensors[0])


def _remembered(plan: Plan) -> Plan:
    if not torch.compiler.is_compiling():
        _made_for[plan.forward.counts] = plan.geometry
    return plan


@dataclass(frozen=True)
class PlanStatistics:
    """What the cost of a plan depends on, as 0-d float32 tensors on its device: nothing is read until they are.

    Args:
        columns: mean number of experts that a window lists; forward, input gradient, weight gradient.
        useful: share of the forward windows' columns that their pixels select.
        touched: share of the taps (input gradient) and tiles (weight gradient) of listed experts that select them.
    """

    columns: tuple[Tensor, Tensor, Tensor]
    useful: Tensor
    touched: tuple[Tensor, Tensor]


def plan_statistics(plan: Plan) -> PlanStatistics:
    """What a cost model and a bench want to know of a plan."""
    geometry = plan.geometry
    forward, input_grad, weight_grad = (
        windows.counts.to(torch.float32).mean() for windows in (plan.forward, plan.input_grad, plan.weight_grad)
    )
    inside = (plan.forward.slots[..., 0] != -1).sum(2)  # pixels of a window on the map
    columns = (plan.forward.counts * inside).sum(dtype=torch.float32)
    selections = geometry.choices * geometry.grid[0] * geometry.grid[1] * geometry.selected
    return PlanStatistics(
        columns=(forward, input_grad, weight_grad),
        useful=selections / columns.clamp(min=1),
        touched=(
            _touched(plan.input_grad, geometry.families[1].mask_bits),
            _touched(plan.weight_grad, geometry.families[2].mask_bits),
        ),
    )


def _touched(windows: Windows, bits: int) -> Tensor:
    assert windows.masks is not None
    bits = min(bits, MOST_MASK_BITS)
    set_bits = torch.stack([(windows.masks >> bit & 1).sum(dtype=torch.float32) for bit in range(bits)]).sum()
    return set_bits / (windows.counts.sum() * bits).clamp(min=1)
