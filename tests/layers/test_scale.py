"""The zero that carries the loss's scale: whose it is, how long it lives, who shares it, and what is said of its misuse."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.errors import SmoeError
from smoe_hpc.layers import (
    AuxiliaryLosses,
    Damping,
    RoutingLoss,
    SpatialMoE2d,
    end_step,
    make_gate,
    routing_loss,
)

from .networks import GRID, network, normal, seeded, task


def taken(model: nn.Module) -> list[Tensor]:
    """The gradients, which start again from none."""
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


def apart(model: nn.Module, inputs: list[Tensor], scale: float) -> list[Tensor]:
    """Gradients of forwards that are backpropagated one after another."""
    for number, x in enumerate(inputs):
        (scale * (task(model(x), number) + routing_loss(model))).backward()
    return taken(model)


# -- whose it is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["one sum for both", "read before each", "read after each", "one backward", "many sums"])
def test_each_forward_has_its_own_scalar(how: str):
    model, inputs = network(), [normal(2, 2, *GRID, seed=s) for s in (5, 6)]
    expected = apart(model, inputs, 0.125)
    if how == "read after each":
        zeros = []
        for number, x in enumerate(inputs):
            y = model(x)
            zeros.append(0.125 * (task(y, number) + routing_loss(model)))
            del y
            zeros[-1].backward()
    else:
        outputs = [model(x) for x in inputs]
        zero = routing_loss(model)
        if how == "one sum for both":
            (0.125 * (task(outputs[0], 0) + zero)).backward()
            (0.125 * (task(outputs[1], 1) + zero)).backward()
        elif how == "one backward":
            (0.125 * (task(outputs[0], 0) + task(outputs[1], 1) + zero)).backward()
        elif how == "read before each":
            (0.125 * (task(outputs[0], 0) + routing_loss(model))).backward()
            (0.125 * (task(outputs[1], 1) + routing_loss(model))).backward()
        else:
            again = [routing_loss(model) for _ in range(3)]
            (0.125 * (task(outputs[0], 0) + again[1])).backward()
            (0.125 * (task(outputs[1], 1) + again[2])).backward()
    assert_same(taken(model), expected)


def test_two_networks_that_are_asked_together_may_have_backwards_of_their_own():
    # A generator's output goes detached to the other network first, and is used again for its own loss.
    def train(ask_together: bool) -> list[Tensor]:
        generator, other = network(), network(filters_per_expert=1, generator=seeded(4))
        model = nn.ModuleList([generator, other])
        made = generator(normal(2, 2, *GRID))
        part = model if ask_together else other
        (0.125 * (task(other(made.detach())) + routing_loss(part))).backward()
        found = taken(other)
        (0.125 * (task(other(made), 2) + routing_loss(model))).backward()
        return found + taken(model)

    assert_same(train(True), train(False))


def test_parallel_layers_have_the_scale_each():
    model, x = network(), normal(2, 2, *GRID)
    loss = task(model[0](x)) + task(model[2](x)) + routing_loss(model)
    (0.125 * loss).backward()
    ours = taken(model)
    for layer in (model[0], model[2]):
        (0.125 * (task(layer(x)) + routing_loss(layer))).backward()
    assert_same(ours, taken(model))


def test_it_may_be_read_to_log_it():
    model, x = network(), normal(2, 2, *GRID)
    expected = apart(model, [x], 0.125)
    y = model(x)
    assert routing_loss(model).item() == 0.0
    with torch.no_grad():
        routing_loss(model)
    (0.125 * (task(y, 0) + routing_loss(model))).backward()
    assert routing_loss(model).item() == 0.0
    assert_same(taken(model), expected)
    assert_same(apart(model, [x], 0.125), expected)


def test_a_retained_graph_can_be_used_again_at_its_scale():
    model, x = network(damping=None), normal(2, 2, *GRID)
    expected = apart(model, [x], 8.0)
    y = model(x)
    for _ in range(2):
        (8.0 * (task(y, 0) + routing_loss(model))).backward(retain_graph=True)
    assert_same([g / 2 for g in taken(model)], expected)


@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_score_may_be_maximised(scale: float, weighted: bool):
    model, x = network(weighted=weighted), normal(2, 2, *GRID)
    expected = apart(model, [x], scale)
    score = -task(model(x), 0)
    (-scale * (score + routing_loss(model))).backward()
    assert_same(taken(model), expected)


# -- misuse ----------------------------------------------------------------------------------------------------------------


def test_asked_before_the_forward():
    model, x = network(), normal(2, 2, *GRID)
    zero = routing_loss(model)
    with pytest.raises(SmoeError, match="called before the forward"):
        ((task(model(x)) + zero) / 8).backward()
    expected = apart(network(), [x], 0.125)
    model.zero_grad()
    assert_same(apart(model, [x], 0.125), expected)  # nothing stays


def test_asked_between_two_layers():
    model, x = network(), normal(2, 2, *GRID)
    between = model[0](x)
    zero = routing_loss(model)
    with pytest.raises(SmoeError, match="called before the forward"):
        ((task(model[2](between)) + zero) / 8).backward()


def test_read_before_the_last_forward_of_a_loss():
    model, inputs = network(), [normal(2, 2, *GRID, seed=s) for s in (5, 6)]
    first = task(model(inputs[0]))
    zero = routing_loss(model)
    with pytest.raises(SmoeError, match="before all forwards of this loss had run"):
        ((first + task(model(inputs[1])) + zero) / 8).backward()


@pytest.mark.parametrize("part", [False, True])
def test_added_twice(part: bool):
    model, x = network(), normal(2, 2, *GRID)
    loss = task(model(x)) + routing_loss(model) + routing_loss(model[0] if part else model)
    with pytest.raises(SmoeError, match="more than once"):
        loss.backward()


def test_a_forward_without_gradient_asks_for_nothing():
    model, x = network(), normal(2, 2, *GRID)
    with torch.no_grad():
        model(x)
        routing_loss(model)
    model.eval()
    routing_loss(model)
    model.train()
    task(model(x)).backward()


# -- who shares a gate -----------------------------------------------------------------------------------------------------


def test_layers_that_are_asked_one_by_one_share_their_gate_all_the_same():
    model, x = network(shared=True), normal(2, 2, *GRID)
    expected = apart(model, [x], 1.0)
    for _ in range(3):
        (task(model(x), 0) + routing_loss(model[0]) + routing_loss(model[2])).backward()
        assert_same(taken(model), expected)


@pytest.mark.parametrize("how", ["deepcopy", "copy", "taken out"])
def test_a_layer_of_a_sharing_network_alone_has_the_whole(how: str):
    model, x = network(shared=True), normal(2, 2, *GRID)
    apart(model, [x], 1.0)
    layer = {"deepcopy": copy.deepcopy, "copy": copy.copy, "taken out": lambda layer: layer}[how](model[2])
    alone = SpatialMoE2d(2, 5, 2, GRID, damping=Damping(0.1)).double()
    alone.load_state_dict(layer.state_dict())
    assert_same(apart(layer, [x], 1.0), apart(alone, [x], 1.0))
    assert_same(apart(model, [x], 1.0), apart(network(shared=True), [x], 1.0))


def test_layers_that_were_dropped_do_not_share():
    model, x = network(shared=True), normal(2, 2, *GRID)
    model(x)  # whose output nobody keeps
    alone = SpatialMoE2d(2, 5, 2, GRID, damping=Damping(0.1)).double()
    alone.load_state_dict(model[0].state_dict())
    assert_same(apart(model[0], [x], 1.0), apart(alone, [x], 1.0))


# -- memory ----------------------------------------------------------------------------------------------------------------


def test_memory_goes_with_the_output():
    model = network()
    kept, seen = [], []
    model[1].register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
    gc.collect()
    gc.disable()  # no cycle may be needed to be found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(100):
                kept.append(model(normal(1, 2, *GRID)).detach())  # as a generator's, for the other network
        assert not any(one() is not None for one in seen)
        assert not model[0].pending_forwards()
        y = model(normal(1, 2, *GRID))
        assert len(model[0].pending_forwards()) == 1
        (task(y) + routing_loss(model)).backward()
        assert not model[0].pending_forwards()
        kept_state = model[0].pending_forwards(done=True)
        assert len(kept_state) == 1
        del y, kept_state
        assert not model[0].pending_forwards(done=True)
    finally:
        gc.enable()


def test_a_sum_that_was_read_lives_no_longer_than_its_reader():
    model = network()
    y = model(normal(1, 2, *GRID))
    zero = routing_loss(model)
    (task(y) + zero).backward()
    node = weakref.ref(model[0].pending_forwards(done=True)[0].pending)
    gc.disable()
    try:
        del y, zero
        assert node() is None
    finally:
        gc.enable()


# -- auxiliary losses ------------------------------------------------------------------------------------------------------


def auxiliary_network(shared: bool) -> nn.Sequential:
    gates = [
        make_gate("latent", 5, 2, GRID, auxiliary=AuxiliaryLosses(importance=0.5), softmax=True, generator=seeded(3))
        for _ in range(2)
    ]
    layers = [SpatialMoE2d(2, 5, 2, GRID, gate=gates[0 if shared else i], generator=seeded(i)) for i in range(2)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()


@pytest.mark.parametrize("shared", [False, True])
def test_auxiliary_losses_act_in_plain_backward_as_with_the_routing_loss(shared: bool):
    model, x = auxiliary_network(shared), normal(2, 2, *GRID)
    y = model(x)
    zero = routing_loss(model)
    gates = {id(layer.gate): layer.gate for layer in (model[0], model[2])}.values()
    own = [gate(x)[1] for gate in gates]
    torch.testing.assert_close(zero.double(), sum(own).double())
    (task(y, 0) + zero).backward()
    expected = taken(model)
    task(model(x), 0).backward()
    assert_same(taken(model), expected)
    (-task(model(x), 0)).neg().backward()
    assert_same(taken(model), expected)
    for gate in gates:
        gate.auxiliary = AuxiliaryLosses()
    without = apart(model, [x], 1.0)
    auxiliary = torch.autograd.grad(sum(own), [gate.logits for gate in gates])
    grads = [p for name, p in zip((n for n, _ in model.named_parameters()), expected, strict=True) if "logits" in name]
    plain = [p for name, p in zip((n for n, _ in model.named_parameters()), without, strict=True) if "logits" in name]
    assert_same([a - b for a, b in zip(grads, plain, strict=True)], list(auxiliary))


# -- forwards of several graphs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradients_of_leaves_that_are_no_parameters_of_the_model(scale: float):
    model = network()
    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x = [normal(2, 2, *GRID, seed=seed) for seed in (3, 4)]

    def gradients(forwards: int) -> list[Tensor]:
        ys = [torch.func.functional_call(model, own, (one,)) for one in x[:forwards]]
        return list(torch.autograd.grad((task(ys[0]) + routing_loss(model)) * scale, list(own.values())))

    assert_same(gradients(2), gradients(1))

    def of_input(others: int) -> list[Tensor]:
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        alive = [model(x[1]) for _ in range(others)]
        ((task(model(w * x[0])) + routing_loss(model)) * scale).backward(inputs=[w])
        assert len(alive) == others
        return [w.grad]

    assert_same(of_input(1), of_input(0))


def test_hooks_of_parameters_outside_the_loss_are_not_called():
    model = nn.ModuleDict({"ours": network(), "other": nn.Linear(3, 3)})
    called: list[Tensor] = []
    model["other"].weight.register_hook(called.append)
    doubled = model["ours"][0].weight.register_hook(lambda gradient: 2 * gradient)
    x = [normal(2, 2, *GRID, seed=seed) for seed in (3, 4)]

    def found() -> Tensor:
        model.zero_grad()
        (sum(task(model["ours"](one)) for one in x) + routing_loss(model)).backward()
        return model["ours"][0].weight.grad.clone()

    twice = found()
    doubled.remove()
    torch.testing.assert_close(twice, 2 * found(), rtol=1e-9, atol=1e-15)
    assert called == []


# -- losses that are no numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, float("inf")])
def test_a_loss_without_a_scale_does_not_enter_the_mean_of_errors(bad: float):
    def trained(scales: list[float]) -> nn.Module:
        model = network(routing_loss=RoutingLoss(error_scale="running_mean"))
        for step, scale in enumerate(scales):
            model.zero_grad()
            ((task(model(normal(2, 2, *GRID))) + routing_loss(model)) * scale).backward()
            end_step(model, step)
        return model

    with_it, without = trained([1.0, bad, 1.0, 1.0]), trained([1.0, 1.0, 1.0])
    for one, other in zip(with_it.buffers(), without.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert_same(taken(with_it), taken(without))
