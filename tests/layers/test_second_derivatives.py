"""Derivatives of derivatives through the layer, against autograd of the layer written out."""

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.kernels import reference
from smoe_hpc.layers import AuxiliaryLosses, Damping, RoutingLoss, SpatialMoE2d, make_gate, routing_loss
from tests.layers.written_out import WrittenOut

GRID = (3, 4)
CASES = {
    "undamped": {"damping": None},
    "damped": {"damping": Damping(0.1)},
    "damped to nothing": {"damping": Damping(0.0, quantile=0.7)},
    "gates of the input": {"damping": Damping(0.1), "gate": "conv"},
    "weighted": {"damping": Damping(0.1), "weighted": True},
    "weighted, learning from the task": {
        "routing_loss": None,
        "damping": Damping(0.1, quantile=0.5),
        "weighted": True,
        "gate": "conv",
    },
    "filters": {"damping": Damping(0.1), "filters_per_expert": 3},
}
pytestmark = pytest.mark.filterwarnings("ignore:second derivatives through SpatialMoE2d")


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def network(**options) -> nn.Sequential:
    common = {"routing_loss": RoutingLoss(0.55), "generator": seeded(1), **options}
    channels = 2 * common.get("filters_per_expert", 1)
    first, second = (SpatialMoE2d(c, 4, 2, GRID, **common) for c in (2, channels))
    return nn.Sequential(first, nn.Tanh(), second).double()


def task(y: Tensor) -> Tensor:
    return (y.sin() - normal(*y.shape, seed=2)).square().mean()


def both(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, as the layers make it and written out."""
    loss = task(model(x)) + routing_loss(model)
    return loss, WrittenOut([model[0], model[2]], x, task).loss(x)


def parts(gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [torch.zeros(()) if g is None else g for g in gradients]


def penalty(gradients: tuple[Tensor, ...], seed: int = 3) -> Tensor:
    """A number that every entry of the gradients enters in its own way."""
    return sum((g * normal(*g.shape, seed=seed + i)).sum() + 50 * g.square().sum() for i, g in enumerate(gradients))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of", ["input", "everything"])
def test_the_gradient_of_a_gradient_penalty(case: str, of: str):
    model, x = network(**CASES[case]), normal(2, 2, *GRID).requires_grad_()
    leaves = [x, *model.parameters()]
    asked = [x] if of == "input" else leaves
    found = []
    for loss in both(model, x):
        first = torch.autograd.grad(loss, asked, create_graph=True)
        second = torch.autograd.grad(penalty(first), leaves, allow_unused=True, retain_graph=True)
        together = torch.autograd.grad(loss + 0.1 * penalty(first), leaves)
        found.append([*first, *parts(second), *together])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert found[1][len(asked) + 1].abs().max() > 1e-4  # the penalty's, to the first weight


def test_third_derivatives_too():
    model, x = network(damping=Damping(0.1)), normal(1, 2, *GRID).requires_grad_()
    leaves, found = [x, *model.parameters()], []
    for loss in both(model, x):
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(penalty(first), leaves, create_graph=True)
        found.append(torch.autograd.grad(penalty(second, seed=20), leaves))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("scale", [8.0, -3.0])
def test_a_penalty_at_another_scale(scale: float):
    model, x = network(damping=None), normal(2, 2, *GRID).requires_grad_()
    leaves = [x, *model.parameters()]
    loss = scale * (task(model(x)) + routing_loss(model))
    written = WrittenOut([model[0], model[2]], x, task)
    routing = written.loss(x) - written.loss(x, routing=False)
    expected = scale * written.loss(x, routing=False) + abs(scale) * routing
    found = []
    for total in (loss, expected):
        first = torch.autograd.grad(total, leaves, create_graph=True)
        found.append(torch.autograd.grad(penalty(first), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [None, Damping(0.1)])
def test_the_hessian(damping: Damping | None):
    model, x = network(damping=damping), normal(1, 2, *GRID)
    names = ["0.weight", "2.weight"]
    weights = tuple(model.get_parameter(name).detach().clone() for name in names)

    def ours(*values: Tensor) -> Tensor:
        return task(torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)))

    hessian = torch.autograd.functional.hessian(ours, weights)
    written = WrittenOut([model[0], model[2]], x, task)
    own = [model[0].weight, model[2].weight]
    first = torch.autograd.grad(written.loss(x), own, create_graph=True)
    for row, gradient in zip(hessian, first, strict=True):
        for number in range(0, gradient.numel(), 7):
            expected = torch.autograd.grad(gradient.flatten()[number], own, retain_graph=True, materialize_grads=True)
            for block, theirs in zip(row, expected, strict=True):
                at = block.flatten(0, 4)[number]
                torch.testing.assert_close(at, theirs, rtol=1e-9, atol=1e-12)
    assert hessian[0][0].abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="Batching rule"):  # of the expert convolution
        torch.autograd.functional.hessian(ours, weights, vectorize=True)


def test_a_layer_whose_labels_nobody_knows_is_refused():
    model, x = network(), normal(2, 2, *GRID)
    loss = task(model(x)) + routing_loss(model)
    (gradient,) = torch.autograd.grad(loss, model[2].weight, create_graph=True)
    with pytest.raises(SmoeError, match=r"ask in autograd\.grad"):
        torch.autograd.grad(gradient.square().sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), model[2].weight)  # which needs no more than it has
    assert second.abs().max() > 0


def test_labels_of_two_losses_do_not_mix():
    model, x = network(damping=Damping(0.1)), normal(2, 2, *GRID).requires_grad_()
    y = model(x)
    penalties = [
        penalty(torch.autograd.grad(loss, [x, *model.parameters()], create_graph=True)) for loss in (task(y), y.exp().mean())
    ]
    with pytest.raises(SmoeError, match="two losses through one forward"):
        torch.autograd.grad(sum(penalties), model[0].weight)


def test_other_forwards_of_the_same_backward_have_their_own_labels():
    # As with a penalty at points between real and made samples.
    model, x, other = network(), normal(2, 2, *GRID).requires_grad_(), normal(2, 2, *GRID, seed=5)
    written = WrittenOut([model[0], model[2]], x, task), WrittenOut([model[0], model[2]], other, task)
    loss, y = task(model(other)) + routing_loss(model), model(x)
    leaves = [x, *model.parameters()]
    total = loss + penalty(torch.autograd.grad(task(y), [x], create_graph=True))
    expected = written[1].loss(other) + penalty(torch.autograd.grad(written[0].loss(x, False), [x], create_graph=True))
    for ours, theirs in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_training_that_is_unrolled(steps: int):
    layer, x = SpatialMoE2d(2, 4, 2, GRID, damping=None, generator=seeded(1)).double(), normal(2, 2, *GRID)
    indices = layer.gate.routing(layer.gate(x)[0], layer.expert_order).indices

    def as_layer(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    def written(weight: Tensor) -> Tensor:
        return reference.expert_conv2d_loop(x, weight, indices, padding=layer.padding)

    def after(convolve) -> Tensor:
        start = weight = layer.weight.detach().clone().requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(task(convolve(weight)), weight, create_graph=True)
            weight = weight - 0.5 * gradient
        return torch.autograd.grad(task(convolve(weight)), start)[0]

    torch.testing.assert_close(after(as_layer), after(written), rtol=1e-9, atol=1e-12)


def test_auxiliary_losses_enter_once():
    # Their own second derivatives are ordinary autograd; what must not happen is that they act again on the way back.
    gate = make_gate("conv", 4, 2, GRID, in_channels=2, auxiliary=AuxiliaryLosses(importance=0.5), generator=seeded(0))
    layer = SpatialMoE2d(2, 4, 2, GRID, gate=gate, routing_loss=None, damping=None, weighted=True).double()
    x = normal(2, 2, *GRID).requires_grad_()
    (gradient,) = torch.autograd.grad(task(layer(x)), x, create_graph=True)
    ours = torch.autograd.grad(gradient.square().sum(), gate.network.weight)[0]
    gate.auxiliary = AuxiliaryLosses()
    (gradient,) = torch.autograd.grad(task(layer(x)), x, create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(gradient.square().sum(), gate.network.weight)[0])


def test_a_penalty_without_the_routing_loss_says_that_gates_do_not_learn():
    model, x = network(), normal(2, 2, *GRID).requires_grad_()
    loss = task(model(x))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.warns(UserWarning, match="no gate learns by the routing loss"):
        (loss + gradient.square().sum()).backward()
    assert model[0].gate.logits.grad is None


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacfwd"])
def test_other_transforms_are_right_or_an_error(transform: str):
    model, x = network(), normal(2, 2, *GRID)

    def loss(weight: Tensor) -> Tensor:
        return task(torch.func.functional_call(model, {"0.weight": weight}, (x,)))

    weight = model[0].weight.detach()
    calls = {
        "grad": lambda: torch.func.grad(loss)(weight),
        "jvp": lambda: torch.func.jvp(loss, (weight,), (weight,)),
        "vmap": lambda: torch.func.vmap(loss)(weight[None]),
        "jacfwd": lambda: torch.func.jacfwd(loss)(weight),
    }
    with pytest.raises(ConfigError, match=r"use torch\.autograd\.grad\(\.\.\., create_graph=True\)"):
        calls[transform]()
