"""Tensor routing, the gate that the paper settles on: its values are learned themselves.

Dimensions: N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.moving import wide_default


class LatentGate(Gate):
    """Tensor routing: the values are a learned tensor, independent of the input (paper, section 3).

    Parameter ``logits`` [N, H, W], float32, starts uniform in (-b, b) with b = sqrt(3 N / K).
    """

    def __init__(
        self,
        num_experts: int,
        selected: int,
        grid: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, selected, grid, **options)
        self.logits = nn.Parameter(torch.empty(num_experts, *self.grid, dtype=wide_default()))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new start values; a held choice is released."""
        self.release()
        bound = (3.0 * self.num_experts / self.selected) ** 0.5
        with torch.no_grad():
            self.logits.uniform_(generator=None if self.logits.is_meta else generator).mul_(2.0).sub_(1.0).mul_(bound)

    def raw_values(self, x: Tensor) -> Tensor:
        """The learned tensor [N, H, W]."""
        return self.logits
