"""The gradient that attach_routing_loss forms against autograd of the loss written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import RoutingLossMetrics, RoutingLossRules, attach_routing_loss, reference
from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, end_step, routing_loss, routing_metrics

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


def backward(y: Tensor, values: Tensor, indices: Tensor, g: Tensor, rules: RoutingLossRules, s: float | None = None, **kw):
    """Gradients that reach y and values when dL/dy = g and the scalar was scaled by s."""
    y = y.clone().requires_grad_()
    out, scalar = attach_routing_loss(y, values, indices, rules, **kw)
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
    metrics = RoutingLossMetrics()
    rules = RoutingLossRules(0.4)
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
    rules = RoutingLossRules(0.4, damping_quantile=0.6, damping_factor=factor)
    grad_y, _ = backward(y, values, indices, g, rules, filters=filters)
    kept = reference.correct_selections(g, quantile=0.6, tolerance=1e-3, filters=filters)
    torch.testing.assert_close(grad_y, g * torch.where(kept, 1.0, factor).repeat_interleave(filters, 1))
    assert 0.5 < kept.double().mean() < 0.7


def test_weighted_labels_see_the_output_before_weighting_and_damping_does_not():
    y, values, indices, g = a_case(3)
    before = y * 7.0
    rules = RoutingLossRules(0.4, damping_quantile=0.4)
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
    _, grad_values = backward(y, values, indices, g, RoutingLossRules(0.4), error_divisor=divisor)
    correct = reference.correct_selections(g, quantile=0.4, tolerance=1e-5, divisor=divisor)
    loss = reference.routing_loss(values, reference.labels_of(correct, indices, N))
    torch.testing.assert_close(grad_values, torch.autograd.grad(loss, values)[0])


def test_a_gradient_that_is_not_finite_survives_damping():
    y, values, indices, g = a_case(5)
    g[0, 0, 0, 0], g[1, 1, 2, 2] = float("inf"), float("nan")
    grad_y, grad_values = backward(y, values, indices, g, RoutingLossRules(0.4, damping_quantile=0.4))
    assert not grad_y[0, 0, 0, 0].isfinite()
    assert not grad_y[1, 1, 2, 2].isfinite()
    assert grad_values.isfinite().all()


def test_a_layer_that_shares_its_gate_gives_its_share():
    y, values, indices, g = a_case(6)
    _, whole = backward(y, values, indices, g, RoutingLossRules(0.4))
    _, third = backward(y, values, indices, g, RoutingLossRules(0.4), share=lambda: 1 / 3)
    torch.testing.assert_close(third * 3, whole)


def test_counts_may_be_collected_elsewhere():
    # A process that owns the western half of the pixels sees its half of the gradient, scaled to its own number of them.
    y, values, indices, g = a_case(8)
    half = values[..., : W // 2].detach().requires_grad_()

    def west(counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
        return counts[..., : W // 2], indices[..., : W // 2], batch

    _, whole = backward(y, values, indices, g, RoutingLossRules(0.4))
    _, west_half = backward(y, half, indices, g, RoutingLossRules(0.4), collect=west)
    torch.testing.assert_close(west_half / 2, whole[..., : W // 2])


# -- an empty batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_teaches_nothing(kind: str, dtype: torch.dtype, device: str):
    y, values, indices, g = (t if t is None else t.detach() for t in a_case(14, 2, kind))
    y, g = y[:0].to(device, dtype), g[:0].to(device, dtype)
    values = (values[:0] if kind == "per_sample" else values).to(device, dtype).requires_grad_()
    indices = (indices if kind == "shared" else indices[:0]).to(device)
    metrics = RoutingLossMetrics(wants_errors=True)
    rules = RoutingLossRules(0.4, damping_quantile=0.6)
    grad_y, grad_values = backward(y, values, indices, g, rules, 2.0, filters=2, metrics=metrics)
    assert grad_y.shape == y.shape
    assert torch.equal(grad_values, torch.zeros_like(values))
    assert metrics.routing_loss is not None
    assert metrics.error_sum is not None
    assert metrics.routing_loss.item() == 0.0
    assert not metrics.error_sum.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_layer_learns_nothing_from_an_empty_batch(weighted: bool):
    layer = SpatialMoE2d(3, N, K, (H, W), weighted=weighted, damping=Damping(0.1))
    (layer(torch.zeros(0, 3, H, W)).square().sum() + routing_loss(layer)).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


# -- changed in place ------------------------------------------------------------------------------------------------------

AFTER = {
    "relu": (lambda y, skip: torch.relu(y), lambda y, skip: nn.ReLU(inplace=True)(y)),
    "skip": (lambda y, skip: y + skip, lambda y, skip: y.add_(skip)),
    "both": (lambda y, skip: torch.relu(2.0 * (y + skip)), lambda y, skip: y.add_(skip).mul_(2.0).relu_()),
    "twice": (lambda y, skip: y + 2.0 * y, lambda y, skip: y.add_(2.0 * y)),
    "masked": (lambda y, skip: y.masked_fill(y < 0, 1.0).exp(), lambda y, skip: y.masked_fill_(y < 0, 1.0).exp_()),
}


@pytest.mark.parametrize("form", ["native", "torch"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("after", AFTER)
def test_what_follows_a_layer_may_work_in_place(
    after: str, weighted: bool, recomputed: bool, form: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SMOE_KERNELS", form)
    generator = torch.Generator().manual_seed(0)
    layer = SpatialMoE2d(3, N, K, (H, W), weighted=weighted, damping=Damping(0.1), generator=generator).double()
    x, skip, g = (torch.randn(B, c, H, W, dtype=torch.float64, generator=generator) for c in (3, K, K))

    def gradients(follow) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), skip.clone().requires_grad_()]

        def block(x: Tensor, skip: Tensor) -> Tensor:
            return follow(layer(x), skip)

        z = checkpoint(block, *leaves, use_reentrant=False) if recomputed else block(*leaves)
        loss = (z * g).sum() + routing_loss(layer)
        found = torch.autograd.grad(loss, (*leaves, *layer.parameters()), allow_unused=True, materialize_grads=True)
        return [z.detach(), *found, routing_metrics(layer)["routing_loss"]]

    out_of_place, in_place = AFTER[after]
    for ours, expected in zip(gradients(in_place), gradients(out_of_place), strict=True):
        assert torch.equal(ours, expected)


def test_in_place_where_the_experts_do_not_learn():
    _, values, indices, g = a_case(15)
    out, _ = attach_routing_loss(g.clone(), values, indices, RoutingLossRules(0.4))
    expected, _ = attach_routing_loss(g, values, indices, RoutingLossRules(0.4))
    (ours,) = torch.autograd.grad(out.relu_().sum(), values)
    assert torch.equal(ours, torch.autograd.grad(expected.relu().sum(), values)[0])


def test_an_output_may_be_used_beside_the_one_that_is_returned():
    y, values, indices, g = a_case(16)
    rules = RoutingLossRules(0.4, damping_quantile=0.4)
    damped, _ = backward(y, values, indices, g, rules)
    u = y.requires_grad_()
    before = u * 2.0
    out, _ = attach_routing_loss(before, values, indices, rules)
    (grad,) = torch.autograd.grad((out * g).sum() + before.sum(), u)
    torch.testing.assert_close(grad, 2.0 * damped + 2.0)


def test_a_producer_that_keeps_its_output_sees_it_unchanged_or_says_so():
    y, values, indices, g = a_case(17)
    u = y.requires_grad_()
    out, _ = attach_routing_loss(torch.tanh(u), values, indices, RoutingLossRules(0.4))
    (grad,) = torch.autograd.grad((out * g).sum(), u)
    torch.testing.assert_close(grad, g * (1.0 - torch.tanh(u) ** 2))
    out, _ = attach_routing_loss(torch.tanh(u), values, indices, RoutingLossRules(0.4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.relu_().sum(), u)


def test_a_leaf_is_not_changed_in_place():
    y, values, indices, _ = a_case(18)
    out, _ = attach_routing_loss(y.requires_grad_(), values, indices, RoutingLossRules(0.4))
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        out.relu_()


# -- rules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantile", "damping_quantile"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_quantile_is_a_share(name: str, share: float):
    with pytest.raises(ConfigError, match=rf"^{name}={share}: a quantile is a share; give a number from 0 to 1, or None$"):
        RoutingLossRules(**{"quantile": 0.5, name: share})
    assert RoutingLossRules(**{"quantile": None, name: 1.0}) != RoutingLossRules(**{"quantile": None, name: 0.0})


@pytest.mark.parametrize("name", ["tolerance", "damping_tolerance"])
@pytest.mark.parametrize("added", [-1e-9, float("nan")])
def test_a_tolerance_is_not_negative(name: str, added: float):
    with pytest.raises(ConfigError, match=rf"^{name}={added}: a tolerance widens .*; give a number of at least 0$"):
        RoutingLossRules(0.5, **{name: added})
    RoutingLossRules(0.5, **{name: 0.0})


# -- the operators ---------------------------------------------------------------------------------------------------------

COUNTS, GATE = torch.ops.smoe_hpc.label_and_damp.default, torch.ops.smoe_hpc.gate_gradient.default


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("filters", [1, 4])
@pytest.mark.parametrize("each", [False, True])
def test_the_halves_are_operators_whose_shapes_are_known(channels_last: bool, filters: int, each: bool):
    g = a_case(9, filters)[3].float()
    g = g.to(memory_format=torch.channels_last) if channels_last else g
    divisor = torch.rand(H, W) + 0.1
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        COUNTS, (g, torch.tensor(2.0), g * 3, divisor, filters, 0.4, 0.0, 0.6, 0.0, 0.1, each, True), test_utils=checks
    )
    torch.library.opcheck(COUNTS, (g, None, None, None, filters, None, 0.0, None, 0.0, 0.1, each, False), test_utils=checks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_gradient_is_an_operator_whose_shapes_are_known(kind: str):
    _, values, indices, g = a_case(10, 1, kind)
    counts = (g > 0).double()
    counts = counts.sum(0) if kind == "shared" else counts
    args = (values.detach(), counts, indices, torch.tensor(2.0), B, 0.5)
    torch.library.opcheck(GATE, args, test_utils=("test_schema", "test_faketensor"))


def test_indices_may_be_int32_and_lie_pixel_by_pixel():
    _, values, indices, g = a_case(11)
    counts = (g > 0).double().sum(0)
    other = indices.int().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for ours, expected in zip(
        GATE(values.detach(), counts, other, None, B, 1.0), GATE(values.detach(), counts, indices, None, B, 1.0), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_second_derivative_has_the_damping_of_the_first():
    y, values, indices, g = a_case(12)
    y.requires_grad_()
    out, _ = attach_routing_loss(y, values, indices, RoutingLossRules(0.4, damping_quantile=0.4, damping_factor=0.1))
    (grad,) = torch.autograd.grad((out**2 * g).sum(), y, create_graph=True)
    kept = reference.correct_selections(2.0 * y.detach() * g, quantile=0.4, tolerance=1e-3)
    factors = torch.where(kept, 1.0, 0.1)
    torch.testing.assert_close(grad, 2.0 * y * g * factors)
    (second,) = torch.autograd.grad(grad.sum(), y)
    torch.testing.assert_close(second, 2.0 * g * factors * factors)  # once on the way there, once on the way back


@pytest.mark.parametrize("filters", [1, 4])
@pytest.mark.parametrize("s", [1024.0, 0.25])
def test_the_sign_of_the_scale_does_not_count(filters: int, s: float):
    y, values, indices, g = a_case(19, filters)
    rules = RoutingLossRules(0.4, damping_quantile=0.6, damping_factor=0.1)
    expected_y, expected_values = backward(y, values, indices, g, rules, s, filters=filters)
    grad_y, grad_values = backward(y, values, indices, -g, rules, -s, filters=filters)
    assert torch.equal(grad_y, -expected_y)
    assert torch.equal(grad_values, expected_values)


def test_weights_that_learn_from_the_task_are_not_damped():
    y, _, indices, g = a_case(20, 2)
    weights = torch.rand(K * 2, H, W, dtype=torch.float64, requires_grad=True)
    y.requires_grad_()
    rules = RoutingLossRules(None, damping_quantile=0.4, damping_factor=0.1)
    out, _ = attach_routing_loss(y, None, indices, rules, filters=2, weights=weights)
    assert torch.equal(out, y * weights)
    grad_y, grad_weights = torch.autograd.grad((out * g).sum(), (y, weights))
    kept = reference.correct_selections(g, quantile=0.4, tolerance=1e-3, filters=2).repeat_interleave(2, 1)
    torch.testing.assert_close(grad_y, g * weights * torch.where(kept, 1.0, 0.1))
    torch.testing.assert_close(grad_weights, (g * y).sum(0))


@pytest.mark.parametrize("error_scale", ["none", "running_mean"])
def test_a_compiled_model_learns_as_it_does_uncompiled(error_scale: str):
    def train(compiled: bool) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)
        loss = RoutingLoss(error_scale=error_scale)
        layers = [SpatialMoE2d(c, N, 4, (H, W), routing_loss=loss, damping=Damping(0.1), generator=generator) for c in (3, 4)]
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
        network = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        x = torch.randn(B, 3, H, W, dtype=torch.float64, generator=generator)
        for step in range(3):
            optimizer.zero_grad()
            (network(x).square().mean() + routing_loss(model)).backward()
            optimizer.step()
            end_step(model, step)
        return [p.detach() for p in model.parameters()], routing_metrics(model)["routing_loss"]

    torch.compiler.reset()
    (ours, our_loss), (expected, expected_loss) = train(True), train(False)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(our_loss, expected_loss, rtol=1e-10, atol=0)
