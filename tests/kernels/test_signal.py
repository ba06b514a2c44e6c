"""The gradient that route_signal forms against autograd of the loss written out."""

import pytest
import torch
from torch import Tensor

from smoe_hpc.kernels import SignalMetrics, SignalRules, reference, route_signal

B, N, K, H, W = 3, 5, 2, 4, 6
KINDS = ["shared", "per_sample", "shared_values_own_choice"]


def a_case(seed: int, filters: int = 1, kind: str = "shared") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output y, gate values, indices, a gradient of y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    values = normal(B, N, H, W) if kind == "per_sample" else normal(N, H, W)
    own = values if kind != "shared_values_own_choice" else values + normal(B, N, H, W)
    indices = own.topk(K, dim=-3).indices
    return normal(B, K * filters, H, W), values.requires_grad_(), indices, normal(B, K * filters, H, W)


def backward(y: Tensor, values: Tensor, indices: Tensor, g: Tensor, rules: SignalRules, s: float | None = None, **kw):
    """Gradients that reach y and values when dL/dy = g and the scalar was scaled by s."""
    y = y.clone().requires_grad_()
    out, scalar = route_signal(y, values, indices, rules, **kw)
    assert torch.equal(out, y)
    assert scalar.item() == 0.0
    loss = (out * g).sum() if s is None else (out * g).sum() + s * scalar
    return torch.autograd.grad(loss, (y, values), allow_unused=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("filters", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [None, 1024.0, 0.25])
def test_gate_gradient_and_loss_equal_autograd_of_the_written_out_loss(seed: int, filters: int, kind: str, s: float | None):
    y, values, indices, g = a_case(seed, filters, kind)
    metrics = SignalMetrics()
    rules = SignalRules(0.4)
    _, grad_values = backward(y, values, indices, g, rules, s, filters=filters, metrics=metrics)
    scale = 1.0 if s is None else s
    correct = reference.correct_selections(g, quantile=0.4, tolerance=1e-5, filters=filters, scale=scale)
    loss = reference.routing_loss(values, reference.labels_of(correct, indices, N))
    (expected,) = torch.autograd.grad(scale * loss, values)
    torch.testing.assert_close(grad_values, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(metrics.routing_loss, loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [0.0, 0.1])
@pytest.mark.parametrize("filters", [1, 4])
def test_damping_multiplies_wrong_selections(factor: float, filters: int):
    y, values, indices, g = a_case(7, filters)
    rules = SignalRules(0.4, damping_quantile=0.6, damping_factor=factor)
    grad_y, _ = backward(y, values, indices, g, rules, filters=filters)
    kept = reference.correct_selections(g, quantile=0.6, tolerance=1e-3, filters=filters)
    torch.testing.assert_close(grad_y, g * torch.where(kept, 1.0, factor).repeat_interleave(filters, 1))
    assert 0.5 < kept.double().mean() < 0.7


def test_weighted_labels_see_the_output_before_weighting_and_damping_does_not():
    y, values, indices, g = a_case(3)
    before = y * 7.0
    rules = SignalRules(0.4, damping_quantile=0.4)
    grad_y, grad_values = backward(y, values, indices, g, rules, before_weighting=before)
    correct = reference.correct_selections(g * before, quantile=0.4, tolerance=1e-5)
    loss = reference.routing_loss(values, reference.labels_of(correct, indices, N))
    torch.testing.assert_close(grad_values, torch.autograd.grad(loss, values)[0])
    kept = reference.correct_selections(g, quantile=0.4, tolerance=1e-3)
    torch.testing.assert_close(grad_y, torch.where(kept, g, 0.0))
    assert not torch.equal(kept, correct)


def test_errors_are_divided_by_the_map():
    y, values, indices, g = a_case(4)
    divisor = torch.linspace(0.1, 10.0, H * W, dtype=torch.float64).view(H, W)
    _, grad_values = backward(y, values, indices, g, SignalRules(0.4), error_divisor=divisor)
    correct = reference.correct_selections(g, quantile=0.4, tolerance=1e-5, divisor=divisor)
    loss = reference.routing_loss(values, reference.labels_of(correct, indices, N))
    torch.testing.assert_close(grad_values, torch.autograd.grad(loss, values)[0])


def test_a_gradient_that_is_not_finite_survives_damping():
    y, values, indices, g = a_case(5)
    g[0, 0, 0, 0], g[1, 1, 2, 2] = float("inf"), float("nan")
    grad_y, grad_values = backward(y, values, indices, g, SignalRules(0.4, damping_quantile=0.4))
    assert not grad_y[0, 0, 0, 0].isfinite()
    assert not grad_y[1, 1, 2, 2].isfinite()
    assert grad_values.isfinite().all()


def test_a_layer_that_shares_its_gate_gives_its_share():
    y, values, indices, g = a_case(6)
    _, whole = backward(y, values, indices, g, SignalRules(0.4))
    _, third = backward(y, values, indices, g, SignalRules(0.4, gate_share=1 / 3))
    torch.testing.assert_close(third * 3, whole)


def test_counts_may_be_collected_elsewhere():
    # A process that owns the western half of the pixels sees its half of the gradient, scaled to its own number of them.
    y, values, indices, g = a_case(8)
    half = values[..., : W // 2].detach().requires_grad_()

    def west(counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
        return counts[..., : W // 2], indices[..., : W // 2], batch

    _, whole = backward(y, values, indices, g, SignalRules(0.4))
    _, west_half = backward(y, half, indices, g, SignalRules(0.4), collect=west)
    torch.testing.assert_close(west_half / 2, whole[..., : W // 2])
