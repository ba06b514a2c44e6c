"""The tiles that suit a layer's sizes: 128 rows of a matrix, some pixels times some samples.

Dimensions: B batch, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_MASK_BITS = 16
_TILES = {32: (2, 2), 16: (2, 4), 8: (4, 4), 4: (4, 8), 2: (8, 8), 1: (8, 16)}
_DOUBLE_AREA = 1.18  # how much longer a tile's list of experts is where a gate is smooth and the tile has twice the pixels


@dataclass(frozen=True)
class Tile:
    """128 rows of a matrix: ``rows`` x ``columns`` pixels times ``batch`` samples, the sample varying fastest."""

    rows: int
    columns: int
    batch: int


def tile_for(batch: int, per_sample: bool = False) -> Tile:
    """The tile for a batch: many samples of few pixels, whose list of experts is short, but few samples that do not exist.

    One sample where each has its own choice.
    """
    if per_sample:
        return Tile(*_TILES[1], 1)

    def cost(samples: int) -> float:
        return -(-batch // samples) * samples * _DOUBLE_AREA ** math.log2(32 / samples)

    samples = min(_TILES, key=cost)
    return Tile(*_TILES[samples], samples)


def region_of(num_experts: int, selected: int, grid: tuple[int, int], tile: Tile) -> tuple[int, int]:
    """Rows and columns of the weight gradient's regions.

    A larger region adds fewer sums to memory, one smaller lists fewer experts that a pixel does not select: 8x8 pixels, but
    16x16 where a tile lists most of the experts anyway and the grid has regions for all multiprocessors, and 4x8 where many
    samples meet so coarse a grid that there would be too few regions to share out evenly.
    """
    pixels = grid[0] * grid[1]
    side = 16 if num_experts <= 3 * selected and pixels >= 64 * 256 else 8
    while (side // tile.rows) * (side // tile.columns) > MOST_MASK_BITS:
        side //= 2
    rows = side // 2 if tile.batch >= 16 and pixels <= 32 * 64 else side
    return max(rows, tile.rows), max(side, tile.columns)


def input_tile_of(tile: Tile) -> Tile:
    """The input gradient's tile: the forward's, but of at most 8 samples, since its halo costs more the smaller a tile is."""
    return tile if tile.batch <= 8 else Tile(4, 4, 8)
