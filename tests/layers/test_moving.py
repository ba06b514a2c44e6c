"""Layers that are cast, moved, made on the meta device, saved and loaded."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.errors import CheckpointError, ConfigError
from smoe_hpc.layers import (
    GATES,
    CondConv2d,
    Conv2d,
    CoordConv2d,
    CounterDropout,
    GhostBatchNorm2d,
    LocallyConnected2d,
    LowRankLocallyConnected2d,
    RoutingLoss,
    SpatialMoE2d,
    begin_step,
    end_step,
    hold_routing,
    routing_loss,
)

GRID = (4, 6)
OTHERS = (Conv2d, CoordConv2d, CondConv2d, LocallyConnected2d, LowRankLocallyConnected2d)
RUNNING = RoutingLoss(error_scale="running_mean")
WEIGHTED = RoutingLoss(error_scale="loss_weight")
HALVES = (torch.float16, torch.bfloat16)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


X = drawn(2, 3, *GRID)


def make(kind: Any) -> nn.Module:
    """A layer of ours by class, or an SMoE layer by the name of its gate."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(kind, str):
        torch.manual_seed(0)  # of torch's own layers inside gates
        return SpatialMoE2d(3, 8, 4, GRID, gate=kind, generator=generator)
    if kind is GhostBatchNorm2d:
        return GhostBatchNorm2d(3, group=2)
    torch.manual_seed(0)
    return kind(3, 4, GRID, generator=generator)


KINDS = (*[gate for gate in GATES if gate != "fixed"], *OTHERS, GhostBatchNorm2d)


# -- the meta device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_made_on_the_meta_device_and_loaded_it_is_the_layer(kind: Any, training: bool):
    real = make(kind)
    with torch.device("meta"):
        layer = make(kind)
    layer.train(training)
    assert layer(X.to("meta")).shape == real(X).shape  # shapes can be asked for before there is memory
    layer.to_empty(device="cpu")
    for buffer in [b for b in layer.buffers() if b.is_floating_point()]:
        buffer.fill_(4e27)  # what memory may happen to hold; what is worked out is not looked at until it is loaded
    layer.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(layer(X), real.train(training)(X))


@pytest.mark.parametrize("kind", ["latent", "coordconv"])
def test_made_on_the_meta_device_it_takes_the_tensors_of_a_dict_as_they_are(kind: str):
    def network() -> nn.Sequential:
        return nn.Sequential(make(kind), CounterDropout(0.5)).eval()

    real = network()
    with torch.device("meta"):
        model = network()
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model(X), real(X))
    for one in (model, real):
        begin_step(one.train(), 3, torch.arange(len(X)))
    assert torch.equal(model(X), real(X))


def test_a_default_of_16_bits_is_for_filters_alone():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = SpatialMoE2d(3, 8, 4, GRID, routing_loss=RUNNING)
    finally:
        torch.set_default_dtype(before)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.gate.logits.dtype == layer.running_error.dtype == torch.float32


def test_a_training_step_on_the_meta_device_has_shapes():
    with torch.device("meta"):
        layer = SpatialMoE2d(3, 8, 4, GRID, routing_loss=RUNNING)
    for step in range(2):
        y = layer(X.to("meta"))
        (y.sum() + routing_loss(layer)).backward()
        end_step(layer, step)
    assert layer.weight.grad.shape == layer.weight.shape
    assert layer.gate.logits.grad.shape == (8, *GRID)


def test_a_layer_that_was_sent_to_the_meta_device_and_back_holds_no_choice_of_before():
    layer = make("latent")
    end_step(layer, 0)
    layer.to("meta")
    assert layer(X.to("meta")).shape == (2, 4, *GRID)
    layer.to_empty(device="cpu")
    assert layer.gate.held == {}
    layer.load_state_dict(make("latent").state_dict())
    assert torch.equal(layer(X), make("latent")(X))


def test_sums_of_a_step_on_the_meta_device_do_not_go_into_the_next():
    with torch.device("meta"):
        layer = nn.Sequential(SpatialMoE2d(3, 8, 4, GRID, routing_loss=RUNNING), GhostBatchNorm2d(4, group=2))
    (layer(X.to("meta")).sum() + routing_loss(layer)).backward()
    layer.to_empty(device="cpu")
    layer[0].reset_parameters()
    layer[0].gate.reset_parameters()
    layer[1].reset_parameters()
    (layer(X).square().sum() + routing_loss(layer)).backward()
    end_step(layer, 0)
    assert layer[0].running_steps == layer[1].renewals == 1


@pytest.mark.parametrize("kind", ["latent", *OTHERS, GhostBatchNorm2d], ids=str)
def test_deferred_initialisation_starts_where_the_constructor_does(kind: Any):
    real = make(kind)
    with torch.device("meta"):
        layer = make(kind)
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(0)
    generator = {} if kind is GhostBatchNorm2d else {"generator": torch.Generator().manual_seed(0)}
    layer.reset_parameters(**generator)
    for name, module in layer.named_children():
        module.reset_parameters(**(generator if name == "gate" else {}))
    for name, value in real.state_dict().items():
        if not name.startswith("routing."):  # torch's own layer, which draws from torch's generator
            assert torch.equal(layer.state_dict()[name], value), name


def test_the_key_of_dropout_is_worked_out_again():
    real = CounterDropout(0.5, seed=3, layer=2)
    with torch.device("meta"):
        layer = CounterDropout(0.5, seed=3, layer=2)
    layer.to_empty(device="cpu")
    for each in (real, layer):
        begin_step(each, 5, torch.arange(2))
    assert torch.equal(layer(X), real(X))


def test_a_loss_weight_is_kept_or_asked_for_again():
    layer = SpatialMoE2d(3, 8, 4, GRID, routing_loss=WEIGHTED)
    layer.set_loss_weight(torch.full(GRID, 3.0))
    layer.to_empty(device="cpu")
    assert (layer.loss_weight == 3).all()
    layer.to("meta").to_empty(device="cpu").load_state_dict(make("latent").state_dict())
    with pytest.raises(ConfigError, match="call set_loss_weight first"):
        layer(X)


# -- types and memory formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "conv", *OTHERS], ids=str)
def test_channels_last(kind: Any):
    plain = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), make(kind))
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    y, expected = model(X.to(memory_format=torch.channels_last)), plain(X)
    torch.testing.assert_close(y, expected)
    for each, output in ((model, y), (plain, expected)):
        (output.square().mean() + routing_loss(each)).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_channels_last_and_a_type_together():
    layer = make("latent").to(dtype=torch.float64, memory_format=torch.channels_last)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.is_contiguous()


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_that_need_float32_keep_it(dtype: torch.dtype):
    layer = SpatialMoE2d(3, 8, 4, GRID, routing_loss=RUNNING)
    layer.update_running_error(torch.full(GRID, 1.0001), 1)
    weighted = SpatialMoE2d(3, 8, 4, GRID, routing_loss=WEIGHTED)
    weighted.set_loss_weight(torch.full(GRID, 1.0001))
    normal, coordinates = GhostBatchNorm2d(3, group=2), CoordConv2d(3, 4, GRID)
    normal.running_mean.fill_(1.0001)
    before = coordinates.coordinates.clone()
    nn.ModuleList([layer, weighted, normal, coordinates]).to(dtype)
    assert layer.weight.dtype == normal.weight.dtype == dtype
    assert torch.equal(layer.running_error, torch.full(GRID, 1.0001))
    assert torch.equal(weighted.loss_weight, torch.full(GRID, 1.0001))
    assert torch.equal(normal.running_mean, torch.full((3,), 1.0001))
    assert torch.equal(coordinates.coordinates, before)
    y = normal(coordinates(X.to(dtype))[:, :3])
    (layer(y).float().square().mean() + routing_loss(layer)).backward()
    end_step(nn.ModuleList([layer, normal]), 0)
    assert normal.eval()(y).dtype == dtype
    assert layer.running_error.dtype == torch.float32
    assert layer.running_error.isfinite().all()


def test_errors_of_a_half_precision_layer_are_divided_by_numbers_above_zero():
    layer = SpatialMoE2d(3, 8, 4, GRID, routing_loss=RUNNING).half()
    end_step(layer, 0)
    (layer(X.half()).float().square().mean() + routing_loss(layer)).backward()
    assert layer.gate.logits.grad.isfinite().all()
    layer.update_running_error(torch.full(GRID, 1e-9), 1)
    assert (layer.error_divisor() > 0).all()


# -- saving and loading --------------------------------------------------------------------------------------------------


def saved(layer: nn.Module) -> dict[str, Tensor]:
    """A state dict that has been through a file."""
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("gate", ["latent", "conv"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gates_stay_in_float32_when_tensors_of_another_type_are_assigned(gate: str, dtype: torch.dtype):
    layer = SpatialMoE2d(3, 8, 4, GRID, gate=gate, routing_loss=RUNNING)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype == dtype
    assert {p.dtype for p in layer.gate.parameters()} == {layer.running_error.dtype} == {torch.float32}
    assert all(p.is_leaf and p.requires_grad for p in layer.gate.parameters())


def test_weights_of_one_order_of_experts_are_not_loaded_into_the_other():
    def network(order: str) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), SpatialMoE2d(3, 8, 4, GRID, expert_order=order))

    ranked = network("rank")
    state = saved(ranked)
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.gate.logits"]
    with pytest.raises(CheckpointError, match=r"layer '1' has expert_order='id', its weights were trained with 'rank'"):
        network("id").load_state_dict(state)
    other = network("rank")
    other.load_state_dict(state)
    assert torch.equal(other(X), ranked(X))
    of_before = saved(ranked)
    for about in of_before._metadata.values():
        about.pop("expert_order", None)
    network("id").load_state_dict(of_before)  # which say nothing
    network("id").load_state_dict(dict(state))  # a plain dict has no room to say it


# -- inference mode ------------------------------------------------------------------------------------------------------


def test_a_step_may_end_in_inference_mode():
    layer = SpatialMoE2d(3, 8, 4, GRID, routing_loss=RUNNING)
    weighted = SpatialMoE2d(3, 8, 4, GRID, routing_loss=WEIGHTED)
    with torch.inference_mode():
        hold_routing(layer)
        weighted.set_loss_weight(torch.ones(GRID))
    for step in range(2):
        (layer(X).square().mean() + routing_loss(layer)).backward()
        with torch.inference_mode():
            end_step(layer, step)
    weighted(X).square().mean().backward()
    assert layer.running_steps == 2
    assert not layer.gate.held["rank"].choice.is_inference()
