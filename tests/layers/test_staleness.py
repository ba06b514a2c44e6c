"""A held choice of experts that grows old: who is warned, and who is not."""

import warnings

import pytest
import torch
from torch import nn

from smoe_hpc.errors import SmoeError
from smoe_hpc.layers import begin_step, end_step, hold_routing, release_routing, routing_loss

from .networks import GRID, network, normal, task


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (task(model(normal(2, 2, *GRID))) + routing_loss(model)).backward()
        optimizer.step()


def test_a_loop_that_forgets_to_renew_the_routing_is_warned_once():
    model = network(shared=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train(model, optimizer, 1)
    end_step(model, 0)
    with pytest.warns(UserWarning, match=r"call smoe_hpc\.layers\.end_step\(model, step\)") as caught:
        train(model, optimizer, 8)
    assert len(caught) == 1


@pytest.mark.parametrize("change", ["an average swapped in", "made anew", "another tensor"])
def test_parameters_that_change_otherwise_count(change: str):
    model = network()
    hold_routing(model)
    logits = model[0].gate.logits
    for _ in range(3):
        model(normal(2, 2, *GRID))
        with torch.no_grad():
            if change == "an average swapped in":
                logits.copy_(torch.randn_like(logits))
            elif change == "made anew":
                nn.init.uniform_(logits)
            else:
                logits.data = torch.randn_like(logits)
    with pytest.warns(UserWarning, match="has trained for 4 forwards with a choice .* parameters have changed since"):
        model(normal(2, 2, *GRID))


def test_one_change_that_nobody_looks_after_is_enough():
    model = network()
    hold_routing(model)
    model(normal(2, 2, *GRID))
    with torch.no_grad():
        model[2].gate.logits.copy_(torch.randn_like(model[2].gate.logits))

    def forwards() -> None:
        for _ in range(10):
            model(normal(2, 2, *GRID))

    with pytest.warns(UserWarning, match="has trained for 4 forwards") as caught:
        forwards()
    assert len(caught) == 1


@pytest.mark.parametrize("way", ["a fused optimiser", "the end of a step in evaluation"])
def test_changes_that_leave_no_trace_and_ends_of_steps_that_renew_nothing(way: str):
    model = network().float()
    fused = way == "a fused optimiser"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    hold_routing(model)

    def steps() -> None:
        for step in range(120 if fused else 5):
            optimizer.zero_grad()
            (model.train()(normal(2, 2, *GRID).float()).square().mean() + routing_loss(model)).backward()
            optimizer.step()
            if not fused:
                end_step(model.eval(), step)

    with pytest.warns(UserWarning, match="has trained for"):
        steps()


def test_a_nan_that_a_fused_optimiser_wrote_is_seen_in_evaluation():
    model = network().float()
    x = normal(2, 2, *GRID).float()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.eval()(x)
    (model.train()(x).square().mean() + routing_loss(model)).backward()
    model[0].gate.logits.grad[0, 0, 0] = torch.nan
    optimizer.step()
    with pytest.raises(SmoeError, match="holds values that are not numbers"):
        model.eval()(x)


@pytest.mark.parametrize("loop", ["every step", "every fifth", "accumulated", "released", "never held"])
def test_loops_that_are_in_order_are_not_warned(loop: str):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if loop != "never held":
            hold_routing(model)
        if loop == "released":
            release_routing(model)
        for step in range(8):
            begin_step(model, step)
            for _ in range(5 if loop == "accumulated" else 1):
                (task(model(normal(2, 2, *GRID))) + routing_loss(model)).backward()
            optimizer.step()
            if loop in ("every step", "every fifth", "accumulated"):
                end_step(model, step, refresh=5 if loop == "every fifth" else 1)
