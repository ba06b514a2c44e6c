"""Share of points that are right: the score of the heat experiment (Dryden and Hoefler 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smoe_hpc.scores.accumulate import PointScore


class Within(PointScore):
    """Percentage of points with |x - y| <= absolute + relative |y|, x the output and y the target.

    A nan is never right.

    Args:
        channels: C.
        grid: (H, W).
        regions: masks [H, W] by name.
        relative: of the target's size.
        absolute: in units of the field, so that a target of 0 can be met.
        name: of the score.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        regions: Mapping[str, Tensor] | None = None,
        relative: float = 0.01,
        absolute: float = 1e-8,
        name: str = "within_1pct",
    ) -> None:
        super().__init__(channels, grid, name=name, regions=regions)
        self.relative, self.absolute = relative, absolute

    def quantity(self, output: Tensor, target: Tensor) -> Tensor:
        """1 where a point is right, else 0: [B, C, H, W]."""
        x, y = output.float() if output.dtype == torch.bfloat16 else output, target
        return (x - y).abs() <= self.absolute + self.relative * y.abs()

    def finish(self, mean: float) -> float:
        """Percent."""
        return 100.0 * mean
