"""The layer on a GPU against the same layer on the CPU, and that a step never waits for the device."""

import copy

import pytest
import torch

from smoe_hpc.kernels import select_experts
from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, end_step, parameter_groups, routing_loss

pytestmark = pytest.mark.gpu
GRID = (6, 8)


def gradients(layer: SpatialMoE2d, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    ((layer(x) - target).square().mean() + routing_loss(layer)).backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("gate", ["latent", "conv", "coordconv", "lcn", "linear"])
@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("filters", [1, 4])
def test_equals_the_cpu(gate: str, padding: str, weighted: bool, filters: int):
    generator = torch.Generator().manual_seed(0)
    options = {"gate": gate, "padding": padding, "weighted": weighted, "filters_per_expert": filters, "generator": generator}
    layer = SpatialMoE2d(3, 6, 2, GRID, routing_loss=RoutingLoss("balanced"), damping=Damping(0.1), **options).double()
    other = copy.deepcopy(layer).cuda()
    x = torch.randn(4, 3, *GRID, dtype=torch.float64, generator=generator)
    target = torch.randn(4, 2 * filters, *GRID, dtype=torch.float64, generator=generator)
    expected = gradients(layer, x, target)
    for name, ours in gradients(other, x.cuda(), target.cuda()).items():
        torch.testing.assert_close(ours.cpu(), expected[name], rtol=1e-9, atol=1e-13, msg=name)


def test_a_step_never_waits_for_the_device():
    layer = SpatialMoE2d(3, 16, 4, GRID, expert_order="id").cuda()
    optimizer = torch.optim.Adam(parameter_groups(layer, lr=1e-3), fused=True)
    x, target = torch.randn(4, 3, *GRID, device="cuda"), torch.randn(4, 4, *GRID, device="cuda")
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.zero_grad()
            ((layer(x) - target).square().mean() + routing_loss(layer)).backward()
            optimizer.step()
            end_step(layer, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_selection_is_the_same_as_on_the_cpu():
    layer = SpatialMoE2d(3, 300, 20, (32, 64))
    with torch.no_grad():
        layer.gate.logits.mul_(4).round_()  # many ties
    here = layer.gate.routing(layer.gate.logits, "rank").indices
    there = layer.gate.routing(layer.gate.logits.cuda(), "rank").indices
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("num_experts", [5, 300, 2000])
@pytest.mark.parametrize("selected", [1, 4])
def test_values_that_are_not_numbers_come_first_whatever_their_sign(num_experts: int, selected: int):
    values = torch.randn(num_experts, 8, 16)
    values[1], values[3] = -torch.nan, torch.nan
    here, there = (select_experts(on, selected).indices for on in (values, values.cuda()))
    assert torch.equal(here, there.cpu())
    assert (here[0] == 1).all()
