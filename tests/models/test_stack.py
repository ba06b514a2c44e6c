"""The model that a recipe describes."""

from dataclasses import replace

import pytest
import torch

from smoe_hpc.config import Gate, Model, RoutingLoss
from smoe_hpc.errors import SmoeError
from smoe_hpc.layers import CondConv2d, LowRankLocallyConnected2d, SpatialMoE2d, begin_step, routing_loss, spatial_layers
from smoe_hpc.models import build_stack

GRID = (6, 8)
KINDS = ("smoe", "conv", "coord_conv", "cond_conv", "lcn", "low_rank_lcn")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("head", ["same", "conv1x1"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str, head: str):
    model = Model(kind=kind, channels=[4, 4, 2], num_experts=6, activation="leaky_relu", head=head, residual=True)
    stack = build_stack(model, 3, GRID, generator=seeded())
    assert len(stack.layers) == (3 if head == "same" else 2)
    x = torch.randn(2, 3, *GRID, generator=seeded())
    y = stack(x)
    assert y.shape == (2, 2, *GRID)
    (y.square().mean() + routing_loss(stack)).backward()
    missing = [name for name, p in stack.named_parameters() if p.grad is None]
    assert not missing


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(kind: str):
    model = Model(kind=kind, channels=[2, 1], num_experts=4)
    one, other = (build_stack(model, 1, GRID, generator=seeded(3)) for _ in range(2))
    third = build_stack(model, 1, GRID, generator=seeded(4))
    states = [m.state_dict() for m in (one, other, third)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_the_published_heat_model_has_its_parameters():
    stack = build_stack(Model(bias=False), 1, (64, 64))
    assert sorted(p.numel() for p in stack.parameters()) == [27, 3 * 64 * 64]


def test_activation_stands_between_layers_and_not_after_the_last():
    model = Model(kind="conv", channels=[1, 1], activation="relu", bias=False, kernel_size=1)
    stack = build_stack(model, 1, GRID)
    for layer in stack.layers:
        layer.weight.data.fill_(-1.0)
    x = torch.tensor([2.0, -3.0]).view(2, 1, 1, 1).expand(2, 1, *GRID)
    assert stack(x)[:, 0, 0, 0].tolist() == [0.0, -3.0]  # 2 -> -2 -> relu 0 -> 0; -3 -> 3 -> 3 -> -3


def test_residual_adds_the_newest_frame():
    stack = build_stack(Model(kind="conv", channels=[1], residual=True), 3, GRID)
    for p in stack.parameters():
        p.data.zero_()
    x = torch.randn(2, 3, *GRID)
    assert torch.equal(stack(x), x[:, 2:])
    two = build_stack(Model(kind="conv", channels=[2], residual=True), 4, GRID, newest=[3, 1])
    for p in two.parameters():
        p.data.zero_()
    x = torch.randn(2, 4, *GRID)
    assert torch.equal(two(x), x[:, [3, 1]])
    with pytest.raises(SmoeError, match=r"model\.residual"):
        build_stack(Model(kind="conv", channels=[3], residual=True), 2, GRID)
    with pytest.raises(SmoeError, match=r"model\.residual"):
        build_stack(Model(kind="conv", channels=[1], residual=True), 2, GRID, newest=[])


def test_sizes_reach_the_layers():
    smoe = build_stack(Model(channels=[8, 4], num_experts=6, filters_per_expert=2, expert_order="id"), 3, GRID)
    assert [(layer.selected, layer.filters_per_expert) for layer in smoe.layers] == [(4, 2), (2, 2)]
    assert all(isinstance(layer, SpatialMoE2d) and layer.expert_order == "id" for layer in smoe.layers)
    (cond,) = build_stack(Model(kind="cond_conv", num_experts=5), 1, GRID).layers
    (low,) = build_stack(Model(kind="low_rank_lcn", num_experts=5, padding="sphere"), 1, GRID).layers
    assert isinstance(cond, CondConv2d)
    assert cond.num_experts == 5
    assert isinstance(low, LowRankLocallyConnected2d)
    assert (low.rank, low.padding) == (5, "sphere")


def test_gates_are_shared_where_sizes_agree():
    model = Model(channels=[4, 4, 4], num_experts=6, gate=Gate(share=True))
    gates = [layer.gate for layer in build_stack(model, 1, GRID).layers]
    assert gates[0] is gates[1] is gates[2]
    apart = build_stack(replace(model, gate=Gate()), 1, GRID)
    assert len({id(layer.gate) for layer in apart.layers}) == 3


def test_the_true_map_routes():
    region = torch.arange(48).view(GRID) % 3
    stack = build_stack(Model(gate=Gate(kind="fixed")), 1, GRID, region_map=region)
    (layer,) = spatial_layers(stack)
    x = torch.randn(1, 1, *GRID)
    indices = layer.gate.routing(layer.gate(x)[0], layer.expert_order).indices
    assert torch.equal(indices[0], region)
    told = build_stack(Model(gate=Gate(kind="conv", region_map=True)), 1, GRID, region_map=region)
    assert told(x).shape == (1, 1, *GRID)
    with pytest.raises(SmoeError, match="true region map"):
        build_stack(Model(gate=Gate(kind="fixed")), 1, GRID)


@pytest.mark.parametrize("kind", ["latent", "conv", "coordconv", "coordconv_multi", "lcn", "linear"])
def test_every_gate_takes_its_options(kind: str):
    gate = Gate(kind=kind, softmax=True, noise="shared")
    losses = RoutingLoss(importance=0.1, load=0.1, spatial_agreement=0.1)
    groups = {"ghost_batch": 2} if kind == "coordconv_multi" else {}
    stack = build_stack(Model(gate=gate, routing_loss=losses, damping=None, **groups), 1, GRID, generator=seeded())
    (layer,) = spatial_layers(stack)
    assert layer.gate.softmax
    assert layer.gate.auxiliary.load == 0.1
    assert layer.damping is None
    begin_step(stack, 0)
    (stack(torch.randn(2, 1, *GRID)).square().mean() + routing_loss(stack)).backward()


def test_noise_of_two_gates_differs_and_follows_the_seed():
    model = Model(channels=[2, 2], num_experts=4, gate=Gate(noise="shared"))
    seeds = [[layer.gate.noise_seed for layer in build_stack(model, 1, GRID, generator=seeded(s)).layers] for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[0][0] != seeds[0][1]


def test_gates_that_read_their_input_are_not_shared():
    with pytest.raises(SmoeError, match="share"):
        build_stack(Model(channels=[4, 4], num_experts=6, gate=Gate(kind="conv", share=True)), 1, GRID)
