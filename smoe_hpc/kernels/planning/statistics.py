"""Figures of a plan: how many experts its windows list, and how much of that is used.

Dimensions: N experts, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_hpc.kernels.planning.plan import Plan, Windows
from smoe_hpc.kernels.planning.tiles import MOST_MASK_BITS


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
