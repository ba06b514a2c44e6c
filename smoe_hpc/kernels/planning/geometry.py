"""Where the windows of a plan lie: tiles, regions and what is known of them without a routing.

Dimensions: S choices (1, or B where each sample has its own), N experts, K selected, H output rows, W output columns,
T windows, U pixels of a window, C capacity of a window's list (N, or its selections if fewer, rounded up to 16).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import torch

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.padding import check_padding
from smoe_hpc.kernels.planning.tiles import MOST_MASK_BITS, Tile, input_tile_of, region_of, tile_for

MOST_EXPERTS = 65535


@dataclass(frozen=True)
class Family:
    """Where one kind of windows lies: windows of ``step`` + ``halo`` pixels, every ``step`` pixels of ``grid``."""

    name: str
    grid: tuple[int, int]
    step: tuple[int, int]
    halo: int
    first: int
    mask_bits: int

    @property
    def masked(self) -> bool:
        """Whether its lists have masks."""
        return self.name != "forward"

    @property
    def tiles(self) -> tuple[int, int]:
        """Windows in a column and in a row of the grid."""
        return -(-self.grid[0] // self.step[0]), -(-self.grid[1] // self.step[1])

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return self.step[0] + self.halo, self.step[1] + self.halo

    def capacity(self, num_experts: int, selected: int) -> int:
        """The most experts a window can list, rounded up to 16."""
        return -(-min(num_experts, self.size[0] * self.size[1] * selected) // 16) * 16


@dataclass(frozen=True)
class Geometry:
    """Everything of a plan that is known without the indices.

    Args:
        num_experts, selected: N, K.
        choices: S.
        grid: (H, W) of the output.
        input_grid: of the input as the kernels see it: the same, or larger where the caller has padded it.
        kernel_size: k.
        offset: output pixel (h, w) and tap (i, j) see input pixel (h + i - offset, w + j - offset).
        wrap: whether columns wrap.
        tile: of forward and, as sub-windows, of the weight gradient.
        input_tile: of the input gradient, on the input's grid.
        region: rows and columns of the weight gradient's windows, in pixels.
    """

    num_experts: int
    selected: int
    choices: int
    grid: tuple[int, int]
    input_grid: tuple[int, int]
    kernel_size: int
    offset: int
    wrap: bool
    tile: Tile
    input_tile: Tile
    region: tuple[int, int]

    @cached_property
    def families(self) -> tuple[Family, Family, Family]:
        """The three kinds of windows: forward, input gradient, weight gradient."""
        halo, tile, own = self.kernel_size - 1, self.tile, self.input_tile
        taps = self.kernel_size**2
        subs = (self.region[0] // tile.rows) * (self.region[1] // tile.columns)
        return (
            Family("forward", self.grid, (tile.rows, tile.columns), 0, 0, 0),
            Family("input_grad", self.input_grid, (own.rows, own.columns), halo, self.offset - halo, taps),
            Family("weight_grad", self.grid, self.region, 0, 0, subs),
        )

    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of the plan, in the order of :meth:`Plan.tensors`."""
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        for family in self.families:
            lead = (self.choices, family.tiles[0] * family.tiles[1])
            pixels = family.size[0] * family.size[1]
            capacity = family.capacity(self.num_experts, self.selected)
            shapes += [(lead, torch.int32), ((*lead, capacity), torch.int32)]
            shapes += [((*lead, capacity), torch.int16)] if family.masked else []
            shapes += [((*lead, pixels, self.selected), torch.int16)]
        return shapes

    def num_bytes(self) -> int:
        """Memory of the plan."""
        total = 0
        for shape, dtype in self.shapes():
            numbers = 1
            for size in shape:
                numbers *= size
            total += numbers * dtype.itemsize
        return total


def plan_geometry(
    num_experts: int,
    selected: int,
    grid: tuple[int, int],
    batch: int,
    kernel_size: int,
    padding: str,
    *,
    per_sample: bool = False,
    tile: Tile | None = None,
    input_tile: Tile | None = None,
    region: tuple[int, int] | None = None,
) -> Geometry:
    """Where the windows of a layer lie.

    Args:
        num_experts, selected: N, at most 65535, and K.
        grid: (H, W) of the output.
        batch: B, at least 1.
        kernel_size: k, odd.
        padding: "zeros", "periodic_longitude", or "sphere", whose input the caller pads by k // 2 on every side.
        per_sample: whether each sample has its own choice.
        tile, input_tile: instead of those that suit the batch.
        region: pixels of the weight gradient's windows, whole tiles, at most 16; by default 8x8, or one tile if it is larger.

    Raises:
        ConfigError: invalid sizes or padding.
    """
    check_padding(padding, grid, kernel_size)
    if not 1 <= selected <= num_experts <= MOST_EXPERTS:
        raise ConfigError(
            f"a plan for selected={selected} of num_experts={num_experts}: give 1 <= selected <= num_experts <= {MOST_EXPERTS}"
        )
    if batch < 1 or min(grid) < 1:
        raise ConfigError(f"a plan for batch={batch} on grid {grid}: each must be at least 1")
    tile = tile or tile_for(batch, per_sample)
    input_tile = input_tile or tile
    region = region or (max(8, tile.rows), max(8, tile.columns))
    subs = (region[0] // tile.rows) * (region[1] // tile.columns)
    if region[0] % tile.rows or region[1] % tile.columns or not 1 <= subs <= MOST_MASK_BITS:
        raise ConfigError(
            f"region {region[0]}x{region[1]} must be whole tiles of {tile.rows}x{tile.columns} pixels, 1 to {MOST_MASK_BITS}"
        )
    reach = kernel_size // 2
    padded = padding == "sphere"
    return Geometry(
        num_experts=num_experts,
        selected=selected,
        choices=batch if per_sample else 1,
        grid=(grid[0], grid[1]),
        input_grid=(grid[0] + 2 * reach, grid[1] + 2 * reach) if padded else (grid[0], grid[1]),
        kernel_size=kernel_size,
        offset=0 if padded else reach,
        wrap=padding == "periodic_longitude",
        tile=tile,
        input_tile=input_tile,
        region=region,
    )


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
