"""Operations that torch counts for an expert convolution."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smoe_hpc.layers import SpatialMoE2d, routing_loss

GRID = (6, 8)


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Of a forward, and of its backward."""
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        (y.sum() + routing_loss(model)).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("filters", [1, 2])
@pytest.mark.parametrize("needs_x", [True, False])
def test_a_layer_counts_as_a_convolution_of_the_same_channels(filters: int, needs_x: bool):
    x = torch.randn(2, 3, *GRID, requires_grad=needs_x)
    layer = SpatialMoE2d(3, 16, 4 // filters, GRID, filters_per_expert=filters)
    assert counted(layer, x) == counted(nn.Conv2d(3, 4, 3, padding=1), x)


def test_written_out():
    forward, backward = counted(SpatialMoE2d(3, 16, 4, GRID, kernel_size=5), torch.randn(2, 3, *GRID, requires_grad=True))
    assert forward == 2 * 2 * 6 * 8 * 4 * 3 * 25
    assert backward == 2 * forward
