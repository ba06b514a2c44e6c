"""The plan of a routing: what the pixels of each window of the grid select, made once for every use of the choice.

The kernels work on windows of neighbouring pixels, which share most of their experts where a gate is smooth. For each
window the plan lists the experts that any of its pixels selects (*columns* of a small dense product) and says for each
selection which column it is. There are three kinds of windows, for forward, input gradient and weight gradient:

    forward      a tile of output pixels; experts by number
    input_grad   the output pixels that a tile of input pixels is read from: the tile and a halo of kernel_size - 1. Masks
                 say which taps need an expert: bit ``i * kernel_size + j``, if a pixel selects it that tap (i, j) leads to
    weight_grad  a region of several forward tiles. Masks say which of the tiles select an expert: bit = tile, row-major

Masked lists are sorted so that what a tap or tile does not need lies together: for taps by the number of bits set, most
first, then by mask, then by expert; for tiles by the mask's rank in a Gray code, in which neighbours differ in one tile, then
by expert. Kernels of more than 16 taps have all bits set.

A plan is a pure function of the indices: its tensors have sizes fixed by shapes alone, nothing is read back from the device.

Dimensions: S choices (1, or B where each sample has its own), N experts, K selected, H output rows, W output columns,
T windows, U pixels of a window, C capacity of a window's list (N, or its selections if fewer, rounded up to 16).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smoe_hpc.kernels.planning.geometry import Geometry


@dataclass(frozen=True)
class Windows:
    """One kind of windows: tensors of int32 or int16 (to be read as unsigned), contiguous, all on one device.

    Args:
        counts: [S, T] int32, number of experts a window's pixels select.
        experts: [S, T, C] int32, the experts that a window lists, its columns; zero beyond the count.
        masks: [S, T, C] int16, which sub-windows select them, a bit each; zero beyond the count. None for forward windows.
        slots: [S, T, U, K] int16, the column of each pixel's k-th selection; 0xffff outside the map.
        tiles: windows in a column and in a row of the grid; T is their product.
        step: rows and columns from one window's first pixel to the next one's.
        first: row and column of the first window's first pixel (0, or negative).
        size: rows and columns of a window; U is their product.
    """

    counts: Tensor
    experts: Tensor
    masks: Tensor | None
    slots: Tensor
    tiles: tuple[int, int]
    step: tuple[int, int]
    first: int
    size: tuple[int, int]

    @property
    def capacity(self) -> int:
        """C, the most experts a window can list."""
        return self.experts.shape[-1]

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of the fields."""
        return [t for t in (self.counts, self.experts, self.masks, self.slots) if t is not None]


@dataclass(frozen=True)
class Plan:
    """The windows of a routing and where they lie."""

    geometry: Geometry
    forward: Windows
    input_grad: Windows
    weight_grad: Windows

    def tensors(self) -> list[Tensor]:
        """Eleven tensors: counts, experts, masks (but forward's), slots of each kind."""
        return [*self.forward.tensors(), *self.input_grad.tensors(), *self.weight_grad.tensors()]

    @staticmethod
    def from_tensors(geometry: Geometry, tensors: list[Tensor]) -> Plan:
        """The plan whose :meth:`tensors` these are."""
        rest = iter(tensors)
        windows = []
        for family in geometry.families:
            counts, experts = next(rest), next(rest)
            masks = next(rest) if family.masked else None
            windows.append(Windows(counts, experts, masks, next(rest), family.tiles, family.step, family.first, family.size))
        return Plan(geometry, *windows)

    def num_bytes(self) -> int:
        """Memory of its tensors."""
        return self.geometry.num_bytes()
