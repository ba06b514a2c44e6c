"""The network of Rasp and Thuerey: its size, its shape written out, every kind of layer in its blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.config import Gate, Model, load_recipe
from smoe_hpc.errors import SmoeError
from smoe_hpc.layers import (
    CounterDropout,
    GhostBatchNorm2d,
    begin_step,
    end_step,
    parameter_groups,
    routing_loss,
    spatial_layers,
)
from smoe_hpc.models import ResNet, build_model, build_resnet

GRID = (6, 8)
SMALL = Model(network="resnet", kind="conv", width=6, blocks=2, ghost_batch=4, padding="periodic_longitude")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(model: Model = SMALL, inputs: int = 5, outputs: int = 2) -> ResNet:
    return build_resnet(model, inputs, outputs, GRID, generator=seeded())


def test_the_published_network_has_its_parameters():
    for name in ("weather_resnet_5p625deg", "weather_resnet_1p4deg"):
        network = build_model(load_recipe(name), 117, 3, (32, 64))
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 6_355_587


def written_out(network: ResNet, x: Tensor) -> Tensor:
    """The forward in evaluation, from the parameters by name."""
    state = network.state_dict()

    def conv(y: Tensor, name: str) -> Tensor:
        half = state[f"{name}.weight"].shape[-1] // 2
        around = torch.cat([y[..., -half:], y, y[..., :half]], dim=-1)
        return F.conv2d(F.pad(around, (0, 0, half, half)), state[f"{name}.weight"], state[f"{name}.bias"])

    def unit(y: Tensor, name: str) -> Tensor:
        y = conv(y, f"{name}.layer")
        y = torch.where(y > 0, y, 0.3 * y)
        mean, variance, weight, bias = (
            state[f"{name}.norm.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (variance + 1e-3).sqrt() * weight + bias

    y = unit(x, "stem")
    for block in range(len(network.blocks)):
        y = y + unit(unit(y, f"blocks.{block}.units.0"), f"blocks.{block}.units.1")
    return conv(y, "head")


def test_it_is_what_was_published():
    network = small(replace(SMALL, dropout=0.1)).double()
    x = torch.randn(8, 5, *GRID, generator=seeded(1), dtype=torch.float64)
    begin_step(network, 0, torch.arange(8))
    network(x)
    end_step(network, 0)  # running statistics that are not the start's
    network.eval()
    torch.testing.assert_close(network(x), written_out(network, x), rtol=1e-10, atol=1e-10)
    norms = [m for m in network.modules() if isinstance(m, GhostBatchNorm2d)]
    assert [(m.eps, m.momentum, m.group) for m in norms] == [(1e-3, 0.01, 4)] * 5
    dropouts = [m for m in network.modules() if isinstance(m, CounterDropout)]
    assert len({int(m.key) for m in dropouts}) == len(dropouts) == 5, "each draws its own"


def test_it_starts_as_glorot_has_it():
    network = build_resnet(replace(SMALL, width=32), 40, 3, GRID, generator=seeded())
    inner = network.blocks[0].units[0].layer
    for layer, fans in ((network.stem.layer, (40 + 32) * 49), (inner, 64 * 9), (network.head, 35 * 9)):
        bound = math.sqrt(6 / fans)
        assert float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["smoe", "conv", "coord_conv", "cond_conv", "lcn", "low_rank_lcn"])
def test_every_kind_learns(kind: str, share: bool):
    if share and kind != "smoe":
        pytest.skip("only SMoE layers have gates")
    experts = 12 if kind in ("smoe", "cond_conv", "low_rank_lcn") else 3
    network = small(replace(SMALL, kind=kind, num_experts=experts, gate=Gate(share=share)))
    if kind == "smoe":
        layers = spatial_layers(network)
        assert [(layer.selected, layer.num_experts) for layer in layers] == [(6, 12)] * 4
        assert len({id(layer.gate) for layer in layers}) == (1 if share else 4)
        bound = math.sqrt(6 / (12 * 9))
        assert 0.8 * bound < float(layers[0].weight.detach().abs().max()) <= bound
        gate = next(layers[0].gate.parameters())
        assert float(gate.detach().abs().max()) > bound, "gates keep their own start"
    begin_step(network, 0, torch.arange(4))
    y = network(torch.randn(4, 5, *GRID, generator=seeded(1)))
    assert y.shape == (4, 2, *GRID)
    (y.square().mean() + routing_loss(network)).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]


def test_only_kernels_decay():
    network = small(replace(SMALL, kind="smoe", num_experts=12))
    groups = {group["name"]: group for group in parameter_groups(network, lr=1.0, weight_decay=2e-5)}
    assert {p.dim() for p in groups["biases"]["params"]} == {1}
    assert len(groups["experts_and_kernels"]["params"]) == 2 + 4  # stem and head; four layers
    assert groups["experts_and_kernels"]["weight_decay"] == 2e-5
    assert groups["biases"]["weight_decay"] == groups["gates"]["weight_decay"] == 0.0


def test_the_seed_decides_start_and_dropout():
    recipe = load_recipe("weather_resnet_5p625deg", ["model={width: 4, blocks: 1, ghost_batch: 4}"])
    x = torch.randn(4, 5, *GRID, generator=seeded(1))

    def output(seed: int) -> Tensor:
        network = build_model(replace(recipe, training=replace(recipe.training, seed=seed)), 5, 3, GRID)
        begin_step(network, 0)
        return network(x)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))


def test_residual_adds_the_newest_frame():
    network = build_resnet(replace(SMALL, residual=True), 5, 2, GRID, newest=[4, 1]).eval()
    for p in network.head.parameters():
        p.data.zero_()
    x = torch.randn(3, 5, *GRID)
    assert torch.equal(network(x), x[:, [4, 1]])
    with pytest.raises(SmoeError, match=r"model\.residual"):
        build_resnet(replace(SMALL, residual=True), 5, 2, GRID, newest=[])


def test_without_dropout_there_is_none():
    network = small(replace(SMALL, dropout=0.0))
    assert not [m for m in network.modules() if isinstance(m, CounterDropout)]
    network(torch.randn(4, 5, *GRID))


def test_longitude_wraps():
    network = small().eval()
    x = torch.randn(1, 5, *GRID)
    torch.testing.assert_close(network(x.roll(3, -1)), network(x).roll(3, -1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(x.roll(1, -2)), network(x).roll(1, -2), atol=1e-3)
