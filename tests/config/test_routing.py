"""RoutingLoss and Damping are one thing, for recipes and for layers."""

import subprocess
import sys

import pytest
import torch

import smoe_hpc.config
from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import GATES, AuxiliaryLosses, Damping, LatentGate, RoutingLoss, SpatialMoE2d, make_gate
from smoe_hpc.models import build_stack

GRID = (4, 6)


def test_recipes_and_layers_share_them():
    assert (smoe_hpc.config.RoutingLoss, smoe_hpc.config.Damping) == (RoutingLoss, Damping)
    model = smoe_hpc.config.Model(routing_loss=RoutingLoss(0.4), damping=Damping(0.1))
    (layer,) = build_stack(model, 1, GRID).layers
    assert isinstance(layer, SpatialMoE2d)
    assert layer.routing_loss is model.routing_loss
    assert layer.damping is model.damping


def test_config_needs_no_torch():
    code = "import sys, smoe_hpc.config; print(sorted({'torch', 'numpy', 'h5py'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan"), float("inf")])
def test_damping_never_amplifies(factor: float):
    with pytest.raises(ConfigError, match=r"damping\.factor=.*: must lie in 0 to 1"):
        Damping(factor)


@pytest.mark.parametrize("kind", sorted(set(GATES) - {"fixed"}))
def test_a_layer_has_the_gates_that_a_recipe_names(kind: str):
    smoe_hpc.config.Gate(kind=kind)  # type: ignore[arg-type]
    assert isinstance(make_gate(kind, 3, 1, GRID, in_channels=2), GATES[kind])
    assert isinstance(make_gate(kind.replace("_", "-"), 3, 1, GRID, in_channels=2), GATES[kind])


def test_a_layer_gives_its_gate_the_auxiliary_losses():
    layer = SpatialMoE2d(2, 3, 1, GRID, routing_loss=RoutingLoss(importance=0.5))
    assert layer.gate.auxiliary == AuxiliaryLosses(importance=0.5)
    layer.train()
    layer(torch.ones(2, 2, *GRID)).sum().backward()


def test_a_gate_with_other_auxiliary_losses_is_refused():
    gate = LatentGate(3, 1, GRID, auxiliary=AuxiliaryLosses(importance=0.1))
    SpatialMoE2d(2, 3, 1, GRID, gate=gate)
    SpatialMoE2d(2, 3, 1, GRID, gate=gate, routing_loss=RoutingLoss(importance=0.1))
    with pytest.raises(ConfigError, match=r"importance=0\.5.*its gate .*importance=0\.1.*make the gate with"):
        SpatialMoE2d(2, 3, 1, GRID, gate=gate, routing_loss=RoutingLoss(importance=0.5))


def test_load_needs_noise():
    with pytest.raises(ConfigError, match="set the gate's noise"):
        SpatialMoE2d(2, 3, 1, GRID, routing_loss=RoutingLoss(load=0.5))
