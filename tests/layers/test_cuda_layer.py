"""The layer on a GPU as training uses it: mixed precision, CUDA graphs, torch.compile, deterministic mode, memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, end_step, hold_routing, parameter_groups, routing_loss

pytestmark = pytest.mark.gpu
GRID = (16, 24)


def make_layer(channels: int = 64, experts: int = 96, selected: int = 32, **options) -> SpatialMoE2d:
    options = {"expert_order": "id", "routing_loss": RoutingLoss(), "damping": Damping(0.1), **options}
    return SpatialMoE2d(channels, experts, selected, GRID, generator=torch.Generator().manual_seed(0), **options)


def batch_of(layer: SpatialMoE2d, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = layer.selected * layer.filters_per_expert
    return tuple(torch.randn(batch, c, *GRID, generator=generator) for c in (layer.in_channels, channels))


def gradients(layer: SpatialMoE2d, x: Tensor, grad: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients; the gradient at the output is given, so that rounding cannot change what is called correct."""
    x = x.clone().requires_grad_()
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        y = layer(x)
    one = torch.ones((), device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad((y, routing_loss(layer)), (x, *layer.parameters()), (grad.to(y.dtype), one))
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize("batch", [1, 5, 32])
@pytest.mark.parametrize("filters", [1, 8])
def test_mixed_precision_against_float64_on_the_cpu(dtype: torch.dtype, padding: str, batch: int, filters: int):
    layer = make_layer(selected=32 // filters, experts=96 // filters, filters_per_expert=filters, padding=padding)
    layer.weight.data = layer.weight.data.to(dtype).float()  # rounded beforehand: autocast's rounding counts for nothing
    x, grad = (t.to(dtype).float() for t in batch_of(layer, batch))
    expected = gradients(copy.deepcopy(layer).double(), x.double(), grad.double())
    found = gradients(copy.deepcopy(layer).cuda(), x.cuda(), grad.cuda(), dtype)
    assert found["weight"].dtype == torch.float32
    for name, theirs in expected.items():
        # Damping rounds its product once more before the convolution's backward; the gate's gradient is made of counts,
        # of which rounding may turn a few.
        limit = {"y": 2e-3, "gate.logits": 1e-3}.get(name, 4e-3)
        off = (found[name].double().cpu() - theirs).norm() / theirs.norm()
        assert off <= limit, f"{name} is off by {off:.1e}"


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(
    "options", [{}, {"weighted": True}, {"gate": "conv"}, {"filters_per_expert": 4, "selected": 8}], ids=str
)
def test_a_training_is_the_same_bit_by_bit_when_deterministic(options: dict):
    def train() -> dict[str, Tensor]:
        layer = make_layer(**options).cuda()
        optimizer = torch.optim.Adam(parameter_groups(layer, lr=1e-3, gate_lr=1e-2))
        for step in range(5):
            x, target = (t.cuda() for t in batch_of(layer, 8, step))
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                y = layer(x)
            ((y.float() - target).square().mean() + routing_loss(layer)).backward()
            optimizer.step()
            end_step(layer, step)
        return {name: p.detach() for name, p in layer.named_parameters()}

    first, second = train(), train()
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_replayed_as_a_cuda_graph_is_the_eager_step(dtype: torch.dtype | None):
    layer = make_layer().cuda()
    hold_routing(layer)
    x, grad = (t.cuda() for t in batch_of(layer, 8))
    other_x, other_grad = (t.cuda() for t in batch_of(layer, 8, seed=2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradients(layer, x, grad, dtype)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gradients(layer, x, grad, dtype)
    x.copy_(other_x)
    grad.copy_(other_grad)
    graph.replay()
    for name, theirs in gradients(layer, other_x, other_grad, dtype).items():
        torch.testing.assert_close(replayed[name], theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_a_step_that_chooses_anew_can_be_captured_too():
    """Selecting and planning inside the graph: the replay follows the logits."""
    layer = make_layer().cuda()
    x, grad = (t.cuda() for t in batch_of(layer, 8))
    for _ in range(2):
        gradients(layer, x, grad, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gradients(layer, x, grad, torch.bfloat16)
    with torch.no_grad():
        layer.gate.logits.copy_(layer.gate.logits.flip(0))
    graph.replay()
    for name, theirs in gradients(layer, x, grad, torch.bfloat16).items():
        torch.testing.assert_close(replayed[name], theirs, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_under_torch_compile_the_layer_gives_what_it_gives_without(dtype: torch.dtype | None):
    torch.compiler.reset()
    layer = make_layer(routing_loss=None, damping=None).cuda()
    hold_routing(layer)
    network = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1), layer, torch.nn.ReLU()).cuda()
    x, grad = (t.cuda() for t in batch_of(layer, 8))
    compiled = torch.compile(network)

    def outcome(model: torch.nn.Module) -> list[Tensor]:
        own = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            y = model(own)
        weights = (own, network[0].weight, layer.weight)
        return [y.detach(), *torch.autograd.grad(y, weights, grad.to(y.dtype))]

    for ours, theirs in zip(outcome(compiled), outcome(network), strict=True):
        off = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert off <= (1e-5 if dtype is None else 5e-3)


def test_a_step_holds_little_more_than_a_plain_convolution():
    grid, batch = (32, 64), 32
    layer = SpatialMoE2d(128, 256, 128, grid, expert_order="id", routing_loss=RoutingLoss(), damping=Damping(0.1)).cuda()
    hold_routing(layer)
    plain = torch.nn.Conv2d(128, 128, 3, padding=1, bias=False).cuda()
    x = torch.randn(batch, 128, *grid, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x.requires_grad_()

    def peak(model: torch.nn.Module) -> int:
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            grads = torch.autograd.grad((y.float().square().mean() + routing_loss(model)), (x, *model.parameters()))
            del y, grads
        return torch.cuda.max_memory_allocated() - before + own

    held = x.numel() * 2
    assert held + peak(layer) <= 1.3 * (held + peak(plain))


@pytest.mark.parametrize("gate", ["conv", "lcn"])
def test_a_choice_of_each_sample_learns_as_on_the_cpu(gate: str):
    layer = make_layer(channels=8, experts=12, selected=4, gate=gate)
    x, grad = batch_of(layer, 3)
    expected = gradients(copy.deepcopy(layer).double(), x.double(), grad.double())
    found = gradients(copy.deepcopy(layer).double().cuda(), x.double().cuda(), grad.double().cuda())
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name].cpu(), theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_layers_on_streams_of_their_own_do_not_disturb_each_other():
    layers = [make_layer().cuda() for _ in range(3)]
    inputs = [tuple(t.cuda() for t in batch_of(layer, 8, seed)) for seed, layer in enumerate(layers)]
    for layer in layers:
        hold_routing(layer)
    alone = [gradients(layer, *given, torch.bfloat16) for layer, given in zip(layers, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    together: list[dict[str, Tensor]] = [{} for _ in layers]
    for _ in range(5):
        for number, (stream, layer, given) in enumerate(zip(streams, layers, inputs, strict=True)):
            with torch.cuda.stream(stream):
                together[number] = gradients(layer, *given, torch.bfloat16)
    torch.cuda.synchronize()
    for ours, theirs in zip(together, alone, strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
