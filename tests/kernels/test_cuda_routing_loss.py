"""The routing loss's CUDA kernels against the form written in torch, on the CPU and in float64."""

import math
import random

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.kernels import row_quantiles
from smoe_hpc.kernels.cuda import routing_loss as cuda
from smoe_hpc.kernels.routing_loss.operators import gate_gradient, label_and_damp
from smoe_hpc.kernels.routing_loss.request import Request
from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, end_step, routing_loss

pytestmark = pytest.mark.gpu
SIZES = [(1, 2, 1, 1, 1), (3, 80, 7, 5, 9), (4, 1500, 20, 8, 12), (2, 300, 128, 33, 31), (2, 1100, 200, 96, 96)]
FILLS = ["normal", "zeros", "equal", "few values", "nan", "inf", "tiny"]


def fill(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    g = torch.randn(shape, generator=generator) * 10.0 ** random.uniform(-6, 1)
    if kind == "zeros":
        g.zero_()
    elif kind == "equal":
        g.fill_(0.37)
    elif kind == "few values":
        g = torch.randint(-2, 3, shape, generator=generator).float()
    elif kind == "nan":
        g.view(-1)[random.randrange(g.numel())] = math.nan
    elif kind == "inf":
        g[torch.rand(shape, generator=generator) < 0.2] = math.inf
    elif kind == "tiny":
        g *= 1e-6
    return g


def poison() -> None:
    """Fill memory that is about to be allocated with NaN, so that an output left unwritten shows."""
    for size in (1 << 8, 1 << 14, 1 << 20):
        held = [torch.full((size,), math.nan, device="cuda") for _ in range(3)]
        del held


def significant_strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(60))
def test_counts_and_damping_equal_the_written_out_form(seed: int):
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    kind, dtype = FILLS[seed % len(FILLS)], random.choice([torch.bfloat16, torch.float16, torch.float32])
    batch, filters, selected = random.choice([1, 2, 5, 32]), random.choice([1, 1, 2, 3, 8, 16]), random.choice([1, 2, 7, 16])
    height, width = random.choice([(1, 1), (1, 2), (3, 5), (7, 9), (16, 32), (32, 64)])
    shape = (batch, selected * filters, height, width)
    layout = random.choice([torch.channels_last, torch.contiguous_format])
    g = fill(kind, shape, generator).to(dtype).contiguous(memory_format=layout)
    before = torch.randn(shape, generator=generator).to(dtype) if random.random() < 0.3 else None
    divisor = torch.rand(height, width, generator=generator) + 0.1 if random.random() < 0.3 else None
    scale = random.choice([None, 1024.0, 0.3, -2.0, 0.0, math.inf])
    s = None if scale is None else torch.tensor(scale)
    quantile, damping = random.choice([(0.3, 0.3), (0.5, 0.7), (0.51, None), (None, 0.4)])
    rest = Request(filters, quantile, 1e-5, damping, 1e-3, 0.05, random.random() < 0.3, random.random() < 0.3)
    expected = label_and_damp(g, s, before, divisor, rest)
    there = [None if t is None else t.cuda() for t in (g, s, before, divisor)]
    poison()
    cuda.label_and_damp(*there, rest)  # raises if the kernels do not serve
    ours = label_and_damp(*there, rest)
    for one, again in zip(ours, label_and_damp(*there, rest), strict=True):
        assert_same(one, again)
    assert [significant_strides(t) for t in ours] == [significant_strides(t) for t in expected]
    if filters == 1:
        assert_same(ours[0], expected[0])
        assert_same(ours[1], expected[1])
    else:  # means over filters are rounded otherwise, so that an error at the very limit may fall on its other side
        for one, other in zip(ours[:2], expected[:2], strict=True):
            different = one.cpu().float().nan_to_num() != other.float().nan_to_num()
            assert different.sum() <= max(2 * batch * filters, 2e-4 * different.numel())
    torch.testing.assert_close(ours[2].cpu(), expected[2], rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("kind", ["shared", "per_sample", "shared_choice", "own_choice"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pixel_major", [False, True])
def test_the_gate_gradient_equals_the_written_out_form(kind: str, sizes: tuple[int, ...], pixel_major: bool):
    batch, experts, selected, height, width = sizes
    generator = torch.Generator().manual_seed(experts)
    values = torch.randn((batch if kind in ("per_sample", "shared_choice") else 1, experts, height, width), generator=generator)
    values = values * 5 if kind in ("per_sample", "shared_choice") else values[0] * 5
    own = values if kind in ("shared", "per_sample") else torch.rand(batch, experts, height, width, generator=generator)
    indices = (own[0] if kind == "shared_choice" else own).topk(selected, -3).indices
    correct = (torch.rand(batch, selected, height, width, generator=generator) < 0.4).float()
    counts = correct.sum(0) if kind == "shared" else correct
    scale = torch.tensor(8.0)
    expected, expected_loss = gate_gradient(values.double(), counts.double(), indices, scale, batch, 0.5)
    there = [t.cuda() for t in (values, counts, indices)]
    if pixel_major:
        there[1:] = [t.movedim(-3, -1).contiguous().movedim(-1, -3) for t in there[1:]]
        there[2] = there[2].int()
    poison()
    cuda.gate_gradient(*there, scale.cuda(), batch, 0.5)  # raises if the kernels do not serve
    grad, loss = gate_gradient(*there, scale.cuda(), batch, 0.5)
    assert (grad.cpu() - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=1e-6, atol=0)
    for one, again in zip((grad, loss), gate_gradient(*there, scale.cuda(), batch, 0.5), strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 257, 100_003])
@pytest.mark.parametrize("odd", [None, math.nan, math.inf, -math.inf, -0.0])
def test_quantiles_are_those_of_the_sorted_rows(quantile: float, size: int, odd: float | None):
    rows = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    rows[3] = rows[3].round()
    if odd is not None:
        rows[1, size // 2] = odd
    assert_same(row_quantiles(rows.cuda(), quantile), row_quantiles(rows, quantile))


def test_nothing_of_the_size_of_all_labels_is_allocated():
    batch, experts, selected, height, width = 16, 512, 8, 32, 64
    g = torch.randn(batch, selected, height, width, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(experts, height, width, device="cuda")
    indices = values.topk(selected, 0).indices
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        counts = label_and_damp(g, None, None, None, Request(1, 0.1, 0.0, 0.1, 0.0, 0.1, False, False))[0]
        gate_gradient(values, counts, indices, None, batch, 1.0)
        used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * values.nbytes < batch * values.nbytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", [1, 4])
def test_forward_and_backward_of_a_layer_can_be_captured(dtype: torch.dtype, filters: int):
    generator = torch.Generator().manual_seed(0)
    layer = SpatialMoE2d(8, 12, 4, (8, 16), filters_per_expert=filters, damping=Damping(0.1), generator=generator).cuda()
    x = torch.randn(4, 8, 8, 16, generator=generator).cuda().requires_grad_()
    target = torch.randn(4, 4 * filters, 8, 16, generator=generator).cuda()
    inputs = [x, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = (layer(x) - target).square().mean() + routing_loss(layer)
        return torch.autograd.grad(loss, inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
        seen = layer.metrics.routing_loss
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=generator))
            layer.gate.logits.copy_(torch.randn(layer.gate.logits.shape, generator=generator))
        graph.replay()
        for ours, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(seen, layer.metrics.routing_loss)


def test_a_step_with_running_errors_never_waits_for_the_device():
    layer = SpatialMoE2d(3, 16, 4, (6, 8), routing_loss=RoutingLoss(error_scale="running_mean")).cuda()
    x, target = torch.randn(4, 3, 6, 8, device="cuda"), torch.randn(4, 4, 6, 8, device="cuda")
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            layer.zero_grad()
            ((layer(x) - target).square().mean() + routing_loss(layer)).backward()
            end_step(layer, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_model_has_the_gradients_of_the_uncompiled_one():
    generator = torch.Generator().manual_seed(0)
    layers = [SpatialMoE2d(c, 12, 4, (8, 16), damping=Damping(0.1), generator=generator) for c in (3, 4)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).cuda()
    x = torch.randn(4, 3, 8, 16, generator=generator).cuda()

    def gradients(network: nn.Module) -> list[Tensor]:
        loss = network(x).square().mean() + routing_loss(model)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    torch.compiler.reset()
    for ours, expected in zip(gradients(torch.compile(model)), gradients(model), strict=True):
        assert (ours - expected).norm() <= 1e-3 * expected.norm()
