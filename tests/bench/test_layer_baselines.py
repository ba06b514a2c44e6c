"""What the benchmark of the layer measures with: gate values of each kind, and baselines that compute what ours computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from smoe_hpc.bench.layer import baselines
from smoe_hpc.bench.layer.baselines import Inputs, conv_gather, plain, published
from smoe_hpc.bench.layer.case import Case, Shape
from smoe_hpc.bench.layer.ours import make_inputs, make_layer, ours, plan_of
from smoe_hpc.bench.layer.routing import gate_values, smooth_fields, train_gate
from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import expert_conv2d
from smoe_hpc.layers import routing_loss

CPU = torch.device("cpu")
TINY = Shape(batch=2, channels=3, grid=(6, 8), num_experts=5, selected=2, filters=2)


def inputs_of(shape: Shape, padding: str = "zeros") -> Inputs:
    torch.manual_seed(1)
    return make_inputs(shape, gate_values(Case(shape, "random"), CPU, dtype=torch.float32), torch.float32, padding)


def gradients(y: Tensor, inputs: Inputs, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, (inputs.x, weight), inputs.grad)


# -- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(20, 40), (5, 9)])
def test_smooth_values_are_scipys(grid: tuple[int, int]):
    fields = smooth_fields(3, grid, torch.Generator().manual_seed(4))
    rough = torch.randn(3, *grid, generator=torch.Generator().manual_seed(4))
    expected = gaussian_filter(rough.numpy(), (0, 4, 4), mode=("nearest", "nearest", "wrap"))
    torch.testing.assert_close(fields, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_a_trained_gate_has_found_some_structure():
    shape = Shape(batch=8, channels=4, grid=(16, 16), num_experts=16, selected=8)

    def experts_of_a_tile(values: Tensor) -> float:
        return plan_of(make_inputs(shape, values, torch.float32, "zeros")).forward.counts.double().mean().item()

    def train(steps: int) -> Tensor:
        return train_gate(shape, torch.Generator().manual_seed(0), steps=steps, padding="zeros", dtype=torch.float32)

    assert experts_of_a_tile(train(120)) < experts_of_a_tile(train(1)) - 0.3


@pytest.mark.parametrize("kind", ["smooth", "random", "learned"])
def test_gate_values_can_be_drawn_again(kind: str):
    case = Case(replace(TINY, filters=1), kind)
    first, second = (gate_values(case, CPU, steps=2, dtype=torch.float32) for _ in range(2))
    assert first.shape == (5, 6, 8)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="routing 'rough'"):
        gate_values(Case(TINY, "rough"), CPU, dtype=torch.float32)


# -- the baselines compute the same thing -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize("filters", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_conv_and_gather_is_our_op(padding: str, filters: int, last: bool):
    inputs = inputs_of(replace(TINY, filters=filters), padding)
    torch.manual_seed(7)
    call = conv_gather("backward", inputs, last=last)
    torch.manual_seed(7)
    weight = baselines.random_filters(inputs, 5 * filters)
    assert call is not None
    y, found = call()
    ours = expert_conv2d(inputs.x, weight.unflatten(0, (5, filters)), inputs.routing.indices, padding=padding)
    torch.testing.assert_close(y, ours)
    torch.testing.assert_close(found, gradients(ours, inputs, weight))
    assert y.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize("filters", [1, 2])
def test_the_published_step_is_our_step(filters: int):
    """With K = 1, where both orders of the selected experts are the same."""
    inputs = inputs_of(replace(TINY, selected=1, filters=filters))
    torch.manual_seed(7)
    call = published("step", inputs)
    torch.manual_seed(7)
    weight = baselines.random_filters(inputs, 5 * filters).detach()
    assert call is not None
    y, (grad_x, grad_weight), (grad_logits,) = call()
    ours = make_layer(inputs, learns=True)
    with torch.no_grad():
        ours.weight.copy_(weight.unflatten(0, (5, filters)))
    expected = ours(inputs.x)
    torch.testing.assert_close(y, expected)
    learned = (inputs.x, ours.weight, ours.gate.logits)
    expected_grads = torch.autograd.grad((expected, routing_loss(ours)), learned, (inputs.grad, torch.ones(())))
    torch.testing.assert_close(grad_x, expected_grads[0])
    torch.testing.assert_close(grad_weight, expected_grads[1].flatten(0, 1))
    torch.testing.assert_close(grad_logits, expected_grads[2])


def test_parts_that_a_way_does_not_have():
    inputs, all_selected = inputs_of(TINY), inputs_of(replace(TINY, selected=5))
    assert conv_gather("step", inputs) is plain("step", inputs) is None
    assert published("step", all_selected) is ours("step", all_selected) is None
    assert ours("plan", inputs) is None  # the kernel of a CPU works without


def test_our_parts():
    inputs = inputs_of(TINY)
    forward, select, backward = (ours(part, inputs) for part in ("forward", "select", "backward"))
    assert forward is not None
    assert select is not None
    assert backward is not None
    y = forward()
    assert y.shape == inputs.grad.shape
    assert not y.requires_grad
    assert torch.equal(select().indices, inputs.routing.indices)
    _, (grad_x, grad_weight) = backward()
    assert grad_x.shape == inputs.x.shape
    assert grad_weight.shape == (5, 2, 3, 3, 3)
