"""The engine against a plain optimiser and a written-out loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.config import Recipe
from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import begin_step, end_step, routing_loss
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.processes import Processes, join

from . import toy


def batches(number: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    samples = toy.MemorySamples(8 * number, seed=5)
    pairs = zip(samples.inputs.to(dtype).split(8), samples.targets.to(dtype).split(8), strict=True)
    return list(pairs)


def with_engine(recipe: Recipe, model: nn.Module, steps: int) -> dict[str, Tensor]:
    engine = Engine(model, recipe, join())
    for step, (x, y) in enumerate(batches(steps, engine.dtype)):
        for part_x, part_y in zip(x.chunk(recipe.training.accumulation), y.chunk(recipe.training.accumulation), strict=True):
            begin_step(model, step)
            engine.backward((engine(part_x) - part_y).square().mean() + routing_loss(model))
            engine.step()
        end_step(model, step)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def written_out(recipe: Recipe, model: nn.Module, steps: int) -> dict[str, Tensor]:
    """Gates apart, not clipped; one backward of the whole batch; torch's optimiser for one tensor at a time."""
    dtype = torch.float64 if recipe.training.precision == "float64" else torch.float32
    model = model.to(dtype)
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    others = [p for name, p in model.named_parameters() if "gate" not in name]
    kernels, biases = [p for p in others if p.dim() > 1], [p for p in others if p.dim() <= 1]
    options = recipe.optimizer
    groups: list[dict[str, Any]] = [
        {"params": kernels, "weight_decay": options.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    if options.kind == "adam":
        gate_group = [{"params": gates, "weight_decay": 0.0, "eps": 1e-15}] if gates else []
        optimizer: torch.optim.Optimizer = torch.optim.Adam(groups + gate_group, lr=options.lr, foreach=False)
    else:
        gate_group = [{"params": gates, "weight_decay": 0.0}] if gates else []
        optimizer = torch.optim.SGD(groups + gate_group, lr=options.lr, momentum=options.betas[0], foreach=False)
    for step, (x, y) in enumerate(batches(steps, dtype)):
        optimizer.zero_grad()
        begin_step(model, step)
        ((model(x) - y).square().mean() + routing_loss(model)).backward()
        if options.clip is not None:
            norm = torch.sqrt(sum((p.grad.square().sum() for p in others), torch.zeros((), dtype=dtype)))
            for p in others:
                p.grad *= min(1.0, float(options.clip / (norm + 1e-6)))
        optimizer.step()
        end_step(model, step)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_equal_a_written_out_loop(accumulation: int, kind: str, clip: float | None) -> None:
    recipe = toy.recipe(
        training__accumulation=accumulation, training__precision="float64", optimizer__kind=kind, optimizer__clip=clip
    )
    found = with_engine(recipe, toy.ToyTask("conv").build_model(), 20)
    expected = written_out(recipe, toy.ToyTask("conv").build_model(), 20)
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-9, atol=1e-12)


def test_gates_are_neither_clipped_nor_in_the_norm() -> None:
    recipe = toy.recipe(training__precision="float64", optimizer__kind="sgd", optimizer__clip=0.01)
    found = with_engine(recipe, toy.ToyTask("smoe").build_model(), 10)
    expected = written_out(recipe, toy.ToyTask("smoe").build_model(), 10)
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-9, atol=1e-12)


def test_an_unused_parameter_decays_as_it_does_among_several_processes() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare_weight = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    weights = with_engine(toy.recipe(optimizer__weight_decay=0.1, optimizer__kind="sgd"), Spare(), 3)
    assert (weights["spare_weight"] < 1).all()


def test_autocast_keeps_float32_parameters_and_gives_float32_outputs() -> None:
    model = toy.ToyTask("conv").build_model()
    engine = Engine(model, toy.recipe(training__precision="bf16"), join())
    x, y = batches(1, torch.float32)[0]
    output = engine(x)
    engine.backward((output - y).square().mean())
    engine.step()
    exact = engine.predict(x)
    assert output.dtype == exact.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(output, output.bfloat16().float())  # it was computed in bfloat16


def test_learning_rates_scale_together() -> None:
    engine = Engine(toy.ToyTask("smoe").build_model(), toy.recipe(optimizer__gate_lr=0.1, optimizer__lr=0.02), join())
    engine.scale_learning_rates(0.5)
    assert engine.learning_rates() == {"experts_and_kernels": 0.01, "gates": 0.05}


def test_float64_with_zero_and_a_batch_that_does_not_divide_are_refused() -> None:
    three = Processes(rank=0, world=3, device=torch.device("cpu"), control=None)
    with pytest.raises(ConfigError, match=r"set training\.zero_stage=0"):
        toy.recipe(training__precision="float64", training__zero_stage=1)
    with pytest.raises(ConfigError, match="batch"):
        Engine(nn.Conv2d(1, 1, 1), toy.recipe(), three)
