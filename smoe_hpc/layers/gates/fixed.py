"""A gate that learns nothing: a map of regions says which expert a pixel uses.

Dimensions: N experts, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.gates.gate import Gate


class FixedGate(Gate):
    """A given map of regions says which expert a pixel uses, as an oracle would; nothing is learned.

    Args:
        region_map: [H, W] integers in 0..N-1.

    Raises:
        ConfigError: more than one selected expert, or a map of another shape or of other numbers.
    """

    region_map: Tensor

    def __init__(self, num_experts: int, selected: int, grid: tuple[int, int], *, region_map: Tensor, **options: Any) -> None:
        super().__init__(num_experts, selected, grid, **options)
        if selected != 1:
            raise ConfigError(f"a fixed gate names one expert a pixel, selected={selected}; set selected=1")
        region_map = check_region_map(region_map, self.grid).long()
        if not region_map.is_meta and not 0 <= int(region_map.min()) <= int(region_map.max()) < num_experts:
            raise ConfigError(
                f"region map holds {int(region_map.min())}..{int(region_map.max())}, num_experts={num_experts}: "
                "give numbers from 0 to num_experts - 1"
            )
        self.register_buffer("region_map", region_map)

    def raw_values(self, x: Tensor) -> Tensor:
        """One at the region's expert, zero elsewhere: [N, H, W]."""
        one_hot = torch.zeros(self.num_experts, *self.grid, device=self.region_map.device)
        return one_hot.scatter_(0, self.region_map[None], 1.0)


def check_region_map(region_map: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The map as a tensor [H, W] of this grid.

    Raises:
        ConfigError: no map, or one of another shape.
    """
    if region_map is None:
        raise ConfigError("this gate needs a region map [H, W]; the heat stores hold one, constants['region']")
    region_map = torch.as_tensor(region_map)
    if tuple(region_map.shape) != tuple(grid):
        raise ConfigError(f"region map is {tuple(region_map.shape)}, the grid {tuple(grid)}: give a map of the same grid")
    return region_map
