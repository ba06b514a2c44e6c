"""Which experts each pixel uses.

Dimensions: B batch, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smoe_hpc.kernels.planning.kept import Plans, kept_plan


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts every pixel uses.

    Args:
        choice: [K, H, W], or [B, K, H, W] where each sample has its own; int64 or int32 numbers of experts, all different at
            a pixel. Output channel k of a pixel is its k-th entry. A GPU's are int32 and lie pixel by pixel, as its kernels
            take them.
        num_experts: N.
    """

    choice: Tensor
    num_experts: int
    _plans: Plans = field(default_factory=dict, init=False, repr=False)

    @property
    def indices(self) -> Tensor:
        """The choice as torch's indexing takes it, int64: a copy where it is int32."""
        return self.choice.to(torch.int64)

    def __getstate__(self) -> dict[str, object]:
        """Without plans: a copy (or a pickle) makes its own."""
        return {**self.__dict__, "_plans": {}}

    @property
    def selected(self) -> int:
        """K, the number of experts a pixel uses."""
        return self.choice.shape[-3]

    @property
    def per_sample(self) -> bool:
        """Whether each sample of the batch has its own choice."""
        return self.choice.dim() == 4

    def plan(self, dtype: torch.dtype, batch: int, weight_shape: Sequence[int], padding: str) -> list[Tensor]:
        """Tensors of this choice's plan for a layer, for :func:`smoe_hpc.kernels.expert_conv2d`; kept for the next time.

        Layers of one gate and equal kernel size share it. Empty where no kernel uses one: on a CPU, or for a layer so small
        that the dense form is faster. A CUDA graph that is captured reads the plan if there is one, and this routing is then
        kept for good; else making it becomes a part of the graph.

        Args:
            dtype: in which the layer computes.
            batch: B.
            weight_shape: N, F, C, k, k.
            padding: of the layer.
        """
        return kept_plan(self._plans, self.choice, self.num_experts, dtype, batch, weight_shape, padding)

    def load(self) -> Tensor:
        """Share of all selections that each expert gets: [N], float32, sums to 1."""
        chosen = self.choice.flatten()
        ones = torch.ones_like(chosen, dtype=torch.int64)
        counts = ones.new_zeros(self.num_experts).index_add_(0, chosen, ones)
        return counts.to(torch.float32) / max(chosen.numel(), 1)

    def changed_from(self, other: Routing) -> Tensor:
        """Share of this routing's selections (pixel, expert) that ``other`` does not have; 0-d float32."""
        if self.selected == 1:
            return (self.choice != other.choice).to(torch.float32).mean()
        new, old = (routing.choice.to(torch.int32).sort(-3).values for routing in (self, other))
        dim = new.dim() - 3
        here = torch.searchsorted(old.movedim(dim, -1).contiguous(), new.movedim(dim, -1).contiguous())
        found = old.movedim(dim, -1).gather(-1, here.clamp(max=self.selected - 1)) == new.movedim(dim, -1)
        return 1.0 - found.to(torch.float32).mean()
