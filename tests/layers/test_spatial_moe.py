import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.layers import (
    AuxiliaryLosses,
    Damping,
    LatentGate,
    RoutingLoss,
    SpatialMoE2d,
    begin_step,
    end_step,
    make_gate,
    parameter_groups,
    routing_loss,
    routing_metrics,
)
from tests.layers.written_out import two_pass_gradients

GRID = (4, 6)
GATES = ["latent", "conv", "coordconv", "coordconv_multi", "lcn", "linear"]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


class Chain(nn.Module):
    """SMoE layers with tanh between them, optionally recomputed in backward."""

    def __init__(self, *layers: SpatialMoE2d, recompute: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute, self.reentrant = recompute, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.recompute else layer(x)
            x = torch.tanh(x) if number < len(self.layers) - 1 else x
        return x


def chain(gate: str = "latent", filters: int = 1, shared: bool = False, depth: int = 2, **kw) -> Chain:
    """3 -> 4 -> ... channels; undamped, float64."""
    options = {"damping": None, "routing_loss": RoutingLoss(0.4), "filters_per_expert": filters, "generator": seeded(1), **kw}
    channels = [3, *[2 * filters] * depth]
    common = LatentGate(5, 2, GRID, generator=seeded(2)) if shared else None
    layers = [SpatialMoE2d(c, 5, 2, GRID, gate=common or gate, **options) for c in channels[:-1]]
    return Chain(*layers).double()


def gradients(model: Chain, x: Tensor, target: Tensor, accumulation: int = 1, scale: float = 1.0) -> dict[str, Tensor]:
    model.zero_grad()
    for part, wanted in zip(x.chunk(accumulation), target.chunk(accumulation), strict=True):
        loss = (model(part) - wanted).square().mean() + routing_loss(model)
        (loss * scale / accumulation).backward()
    return {name: p.grad / scale for name, p in model.named_parameters()}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("filters", [1, 4])
def test_one_backward_equals_the_two_pass_reference(gate: str, filters: int):
    model = chain(gate, filters)
    x, target = normal(4, 3, *GRID), normal(4, 2 * filters, *GRID, seed=1)
    expected = two_pass_gradients(list(model.layers), x, target)
    ours = gradients(model, x, target)
    assert set(ours) == {f"layers.{name}" for name in expected}
    for name, theirs in expected.items():
        torch.testing.assert_close(ours[f"layers.{name}"], theirs, rtol=1e-9, atol=1e-13, msg=name)


def test_a_gate_shared_by_three_layers_gets_the_mean_of_their_gradients():
    model = chain(shared=True, depth=3)
    x, target = normal(4, 3, *GRID), normal(4, 2, *GRID, seed=1)
    expected = two_pass_gradients(list(model.layers), x, target)
    logits = expected["0.gate.logits"]  # autograd has summed the three thirds
    ours = gradients(model, x, target)
    torch.testing.assert_close(ours["layers.0.gate.logits"], logits, rtol=1e-9, atol=1e-13)
    alone = chain(depth=3)
    assert routing_metrics(model)["routing_loss"] < 2 * routing_metrics(_after(alone, x, target))["routing_loss"]


def _after(model: Chain, x: Tensor, target: Tensor) -> Chain:
    gradients(model, x, target)
    return model


@pytest.mark.parametrize("gate", ["latent", "conv"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_do_not_depend_on_accumulation_or_loss_scale(gate: str, accumulation: int, scale: float):
    model = chain(gate, damping=Damping(0.1), filters=4)
    x, target = normal(4, 3, *GRID), normal(4, 8, *GRID, seed=1)
    expected = gradients(model, x, target)
    for name, ours in gradients(model, x, target, accumulation, scale).items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("gate", ["latent", "conv"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_recomputation_changes_nothing(gate: str, accumulation: int):
    model = chain(gate, damping=Damping(0.1))
    x, target = normal(4, 3, *GRID).requires_grad_(), normal(4, 2, *GRID, seed=1)
    expected = gradients(model, x, target, accumulation, 8.0)
    model.recompute = True
    for name, ours in gradients(model, x, target, accumulation, 8.0).items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-12, atol=0, msg=name)
    assert routing_loss(model).item() == 0.0
    assert not routing_loss(model).requires_grad


def test_recomputation_that_loses_the_scale_is_refused():
    model = chain()
    model.recompute = model.reentrant = True
    x = normal(2, 3, *GRID).requires_grad_()
    with pytest.raises(SmoeError, match="use_reentrant=False"):
        (model(x).square().mean() + routing_loss(model)).backward()


@pytest.mark.parametrize("gate", [*GATES, "fixed"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
def test_gradcheck_of_the_task_gradient(gate: str, weighted: bool, padding: str):
    # Without a routing loss and damping, gradients are those of the output: to x, weights and, if weighted, the gate.
    selected = 1 if gate == "fixed" else 2
    region_map = torch.arange(GRID[0] * GRID[1]).view(GRID) % 3
    with_map = region_map if gate == "fixed" else None
    made = make_gate(gate, 3, selected, GRID, in_channels=2, region_map=with_map, generator=seeded(3))
    options = {"weighted": weighted, "padding": padding, "filters_per_expert": 2, "generator": seeded(4)}
    layer = SpatialMoE2d(2, 3, selected, GRID, gate=made, routing_loss=None, damping=None, **options).double()
    x = normal(2, 2, *GRID).requires_grad_()
    if hasattr(made, "detach_input"):
        made.detach_input = False
    parameters = [p for name, p in layer.named_parameters() if weighted or not name.startswith("gate")]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), eps=1e-7, atol=1e-5)


def test_softmax_and_absolute_value_follow_the_chain_rule():
    for option in ({"softmax": True}, {"absolute": True}, {"softmax": True, "absolute": True}):
        gate = make_gate("latent", 5, 2, GRID, generator=seeded(5), **option)
        layer = SpatialMoE2d(3, 5, 2, GRID, gate=gate, damping=None, routing_loss=RoutingLoss(0.4)).double()
        x, target = normal(3, 3, *GRID), normal(3, 2, *GRID, seed=1)
        expected = two_pass_gradients([layer], x, target)["0.gate.logits"]
        ours = gradients(Chain(layer), x, target)["layers.0.gate.logits"]
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-15)


def test_a_weighted_layer_without_routing_loss_learns_its_gate_from_the_task():
    layer = SpatialMoE2d(2, 4, 2, GRID, weighted=True, routing_loss=None, damping=None, generator=seeded(0)).double()
    x = normal(2, 2, *GRID)
    layer(x).square().mean().backward()
    used = torch.zeros(4, *GRID, dtype=torch.bool).scatter_(0, layer.gate.routing(layer.gate.logits, "rank").indices, True)
    assert (layer.gate.logits.grad[used] != 0).all()
    assert (layer.gate.logits.grad[~used] == 0).all()


def test_id_order_keeps_channels_in_place():
    layer = SpatialMoE2d(1, 4, 2, GRID, expert_order="id", generator=seeded(0))
    indices = layer.gate.routing(layer.gate.logits, "id").indices
    assert (indices[0] < indices[1]).all()


def test_all_experts_selected_needs_no_gate():
    layer = SpatialMoE2d(2, 3, 3, GRID, expert_order="id", generator=seeded(0))
    x = torch.randn(2, 2, *GRID)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight[:, 0], padding=1))
    layer(x).sum().backward()
    assert layer.gate.logits.grad is None
    assert not layer.gate.logits.requires_grad


def test_all_experts_selected_and_weighted_learn_their_weights_from_the_task():
    layer = SpatialMoE2d(2, 3, 3, GRID, weighted=True, generator=seeded(0)).double()  # a routing loss there is not
    x = normal(2, 2, *GRID)
    (layer(x).square().mean() + routing_loss(layer)).backward()
    logits = layer.gate.logits.detach().requires_grad_()
    every = nn.functional.conv2d(x, layer.weight[:, 0].detach(), padding=1)
    (every * logits).square().mean().backward()
    torch.testing.assert_close(layer.gate.logits.grad, logits.grad)


def test_a_gate_is_frozen_while_no_layer_uses_it():
    gate = LatentGate(3, 3, GRID)
    SpatialMoE2d(2, 3, 3, GRID, gate=gate)
    assert not gate.logits.requires_grad
    SpatialMoE2d(2, 3, 3, GRID, gate=gate, weighted=True)
    SpatialMoE2d(2, 3, 3, GRID, gate=gate)
    assert gate.logits.requires_grad
    by_hand = LatentGate(3, 3, GRID).requires_grad_(False)
    SpatialMoE2d(2, 3, 3, GRID, gate=by_hand)
    SpatialMoE2d(2, 3, 3, GRID, gate=by_hand, weighted=True)
    assert not by_hand.logits.requires_grad  # as its owner wants it


@pytest.mark.parametrize("weighted", [False, True])
def test_all_experts_selected_under_distributed_data_parallel(weighted: bool):
    model = nn.Sequential(SpatialMoE2d(2, 3, 3, GRID, weighted=weighted, generator=seeded(0)), nn.Conv2d(3, 1, 1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(3):  # a parameter without a gradient is met by the second step
            (parallel(torch.randn(2, 2, *GRID)).square().mean() + routing_loss(model)).backward()
    finally:
        parallel = None  # before its group, whose thread may wait for the interpreter while that waits for the thread
        gc.collect()
        dist.destroy_process_group()
    assert (model[0].gate.logits.grad is not None) == weighted


def test_damping_leaves_a_gate_alone_that_learns_from_the_task():
    def gradients(damping: Damping | None) -> tuple[Tensor, Tensor]:
        layer = SpatialMoE2d(2, 4, 2, GRID, weighted=True, routing_loss=None, damping=damping, generator=seeded(0)).double()
        layer(normal(2, 2, *GRID)).square().mean().backward()
        return layer.gate.logits.grad, layer.weight.grad

    (gate, weight), (damped_gate, damped_weight) = gradients(None), gradients(Damping(0.1, quantile=0.3))
    torch.testing.assert_close(damped_gate, gate)
    assert (damped_weight - weight).abs().max() > 0.1 * weight.abs().max()


def test_gate_stays_in_float32():
    model = SpatialMoE2d(2, 4, 2, GRID).to(torch.bfloat16)
    assert (model.weight.dtype, model.gate.logits.dtype) == (torch.bfloat16, torch.float32)
    y = model(torch.randn(2, 2, *GRID, dtype=torch.bfloat16))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert model.gate.logits.grad.dtype == torch.float32


@pytest.mark.parametrize("gate", GATES)
def test_autocast(gate: str):
    model = SpatialMoE2d(2, 4, 2, GRID, gate=gate, generator=seeded(0))
    x = torch.randn(2, 2, *GRID)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = y.float().square().mean() + routing_loss(model)
    loss.backward()
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_autocast_behind_a_layer_that_gives_bfloat16():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), SpatialMoE2d(2, 4, 2, GRID, generator=seeded(0)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 1, *GRID)).float().square().mean() + routing_loss(model)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_other_dtypes_are_refused_outside_autocast():
    with pytest.raises(ConfigError, match="convert one of them"):
        SpatialMoE2d(2, 4, 2, GRID)(torch.zeros(1, 2, *GRID, dtype=torch.float64))


def test_a_copy_trains_by_itself():
    model = chain(shared=True)
    x, target = normal(4, 3, *GRID), normal(4, 2, *GRID, seed=1)
    model(x).square().mean().backward()  # leaves a scalar that nobody took
    other = copy.deepcopy(model)
    expected = gradients(model, x, target)
    for name, ours in gradients(other, x, target).items():
        assert torch.equal(ours, expected[name])
    assert other.layers[0].gate is other.layers[1].gate is not model.layers[0].gate


def test_loss_weight_is_divided_out_of_the_error():
    weighted, unweighted = RoutingLoss(0.55, error_scale="loss_weight"), RoutingLoss(0.55)
    layer = SpatialMoE2d(2, 4, 2, GRID, routing_loss=weighted, damping=None, generator=seeded(0))
    plain = SpatialMoE2d(2, 4, 2, GRID, routing_loss=unweighted, damping=None, generator=seeded(0))
    weight = torch.linspace(0.1, 2.0, GRID[0])[:, None].expand(GRID)
    x, target = torch.randn(3, 2, *GRID), torch.randn(3, 2, *GRID)
    with pytest.raises(ConfigError, match="set_loss_weight"):
        layer(x)
    layer.set_loss_weight(weight)
    # d/dy of |y - t| weighted gives errors |weight|; divided out they are those of the unweighted loss.
    ((layer(x) - target).square() * weight).mean().backward()
    (plain(x) - target).square().mean().backward()
    torch.testing.assert_close(layer.gate.logits.grad, plain.gate.logits.grad)
    ignorant = copy.deepcopy(plain)
    ignorant.zero_grad()
    ((ignorant(x) - target).square() * weight).mean().backward()
    assert not torch.equal(ignorant.gate.logits.grad, plain.gate.logits.grad)


def test_running_mean_follows_the_error_of_each_pixel():
    layer = SpatialMoE2d(2, 4, 2, GRID, routing_loss=RoutingLoss("balanced", error_scale="running_mean"))
    noisy = torch.ones(GRID)
    noisy[:, :3] = 10.0
    for step in range(300):
        x = torch.zeros(8, 2, *GRID)
        target = noisy * torch.randn(8, 2, *GRID, generator=seeded(step))
        (layer(x) - target).square().mean().backward()
        end_step(layer, step)
    west, east = layer.running_error[:, :3].mean(), layer.running_error[:, 3:].mean()
    assert west.item() == pytest.approx(10 * (2 / torch.pi) ** 0.5, rel=0.1)
    assert east.item() == pytest.approx((2 / torch.pi) ** 0.5, rel=0.1)


def test_auxiliary_losses_reach_the_gate():
    for name in ("importance", "load", "spatial_agreement"):
        gate = make_gate(
            "conv", 4, 2, GRID, in_channels=2, noise="per_sample", auxiliary=AuxiliaryLosses(**{name: 0.5}), generator=seeded(0)
        )
        layer = SpatialMoE2d(2, 4, 2, GRID, gate=gate, routing_loss=None, weighted=True)
        begin_step(layer, 0)
        y = layer(torch.randn(3, 2, *GRID))  # which the scalar lives as long as
        total = routing_loss(layer)
        assert total.item() > 0
        total.backward()
        del y
        assert all(p.grad.abs().sum() > 0 for p in gate.parameters()), name


def test_parameter_groups():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), SpatialMoE2d(2, 4, 2, GRID), nn.BatchNorm2d(2))
    groups = {g["name"]: g for g in parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.1)}
    assert {name: sum(p.numel() for p in g["params"]) for name, g in groups.items()} == {
        "experts_and_kernels": 4 + 4 * 2 * 9,
        "biases": 2 + 4,
        "gates": 4 * 24,
    }
    assert {name: (g["lr"], g["weight_decay"], g["clip"]) for name, g in groups.items()} == {
        "experts_and_kernels": (1e-3, 0.1, True),
        "biases": (1e-3, 0.0, True),
        "gates": (1e-2, 0.0, False),
    }
    assert groups["gates"]["eps"] == 1e-15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected": 5}, "from 1 to num_experts"),
        ({"filters_per_expert": 0}, "must be at least 1"),
        ({"expert_order": "best"}, "rank, id"),
        ({"gate": "latnt"}, "choose one of latent"),
        ({"gate": LatentGate(4, 1, GRID)}, "share a gate only among layers of equal sizes"),
        ({"padding": "wrap"}, "choose one of zeros"),
        ({"grid": (4, 5), "padding": "sphere"}, "even number of columns"),
        ({"routing_loss": None, "damping": Damping(0.5)}, "quantile of its own"),
        ({"kernel_size": 2}, "odd size"),
        ({"weighted": True, "routing_loss": RoutingLoss(error_scale="running_mean")}, "use error_scale='none'"),
    ],
)
def test_impossible_layers_are_refused(change: dict, message: str):
    options = {"in_channels": 2, "num_experts": 4, "selected": 2, "grid": GRID, **change}
    with pytest.raises(ConfigError, match=message):
        SpatialMoE2d(**options)


@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (1, 2, 6, 4), (2, 4, 6)])
def test_another_input_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match="belongs to that grid"):
        SpatialMoE2d(2, 4, 2, GRID)(torch.zeros(shape))


@pytest.mark.parametrize(
    "bad", [{"quantile": 0.0}, {"quantile": 1.5}, {"quantile": "best"}, {"tolerance": -1.0}, {"error_scale": "x"}]
)
def test_impossible_routing_losses_are_refused(bad: dict):
    with pytest.raises(ConfigError):
        RoutingLoss(**bad)


def test_a_quantile_below_the_working_range_is_warned_of():
    with pytest.warns(UserWarning, match="replaced for ever"):
        SpatialMoE2d(2, 2, 1, GRID, routing_loss=RoutingLoss(0.35))
