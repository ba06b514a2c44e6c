"""Weather networks trained by one process, by two, and in micro-batches: the same curve, weights and scores; and taken up.

Batch normalisation and dropout are in all of them, so this holds what their layers promise inside a training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoe_hpc.config import Gate, Model, Optimizer, Recipe, RoutingLoss, Run, to_yaml
from smoe_hpc.errors import ConfigError
from smoe_hpc.report import draw_pictures
from smoe_hpc.tasks import make_task
from smoe_hpc.training import train

from ..training.conftest import environment
from .small_earth import recipe as small_recipe
from .small_earth import write_years

RESNET = Model(network="resnet", kind="conv", width=4, blocks=2, ghost_batch=2, padding="periodic_longitude")
ROUTED = replace(
    RESNET,
    kind="smoe",
    num_experts=8,
    expert_order="id",
    gate=Gate(share=True),
    routing_loss=RoutingLoss(error_scale="loss_weight"),
)
MULTI = Model(channels=[4, 2], num_experts=6, gate=Gate(kind="coordconv_multi"), ghost_batch=2, activation="leaky_relu")
CASES: dict[str, tuple[Model, dict[str, object]]] = {
    "resnet": (RESNET, {}),
    "smoe": (ROUTED, {}),
    "smoe_continuous": (ROUTED, {"leads": [6, 12, 24], "lead_mode": "continuous", "validation_leads": [6, 24]}),
    "low_rank_two_leads": (replace(RESNET, kind="low_rank_lcn"), {"leads": [6, 24], "order": "blocks", "block": 4}),
    "multi": (MULTI, {}),
}
SHARED = [("resnet", 1), ("smoe", 1), *((case, 2) for case in CASES)]
"""Cases and micro-batches of two processes."""


def made(store: Path, case: str, accumulation: int, precision: str = "float64", steps: int = 8) -> Recipe:
    model, data = CASES[case]
    recipe = small_recipe(store, model, **data)
    training = replace(
        recipe.training, batch=8, accumulation=accumulation, precision=precision, max_steps=steps, validate_every=4
    )
    run = Run(pictures=False, checkpoint_every=100)
    return replace(recipe, optimizer=Optimizer(lr=1e-2, weight_decay=2e-5), training=training, run=run)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_years(tmp_path_factory.mktemp("weather"))


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "recipes").mkdir()
    for case, accumulation in SHARED:
        path = folder / "recipes" / f"{case}_{accumulation}.yaml"
        path.write_text(to_yaml(made(store, case, accumulation)))
    (folder / "recipes" / "bf16.yaml").write_text(to_yaml(bf16(store)))
    script = Path(__file__).with_name("train_all.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(script), str(folder / "recipes"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def one(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases trained by one process, the batch in one piece."""
    folder = tmp_path_factory.mktemp("one")
    for case in CASES:
        recipe = made(store, case, 1)
        train(recipe, make_task(recipe), run_dir=folder / case, progress=False)
    return folder


def bf16(store: Path) -> Recipe:
    recipe = made(store, "smoe", 1, "bf16")
    return replace(recipe, training=replace(recipe.training, zero_stage=1))


def curve(run: Path) -> torch.Tensor:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines if line["event"] == "step"], dtype=torch.float64)


def check_same(run: Path, other: Path, tolerance: float) -> None:
    torch.testing.assert_close(curve(run), curve(other), rtol=tolerance, atol=0.0)
    ours, theirs = (load_file(path / "weights.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("running_var") for name in ours)
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
    found, expected = (json.loads((path / "scores.json").read_text())["test"]["all"] for path in (run, other))
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("case", "accumulation"), SHARED)
def test_two_processes_learn_what_one_does(one: Path, two: Path, case: str, accumulation: int):
    check_same(two / f"{case}_{accumulation}", one / case, 1e-10)


@pytest.mark.parametrize("case", ["resnet", "smoe"])
def test_micro_batches_learn_what_a_batch_does(one: Path, store: Path, tmp_path: Path, case: str):
    recipe = made(store, case, 4)
    train(recipe, make_task(recipe), run_dir=tmp_path / "run", progress=False)
    check_same(tmp_path / "run", one / case, 1e-10)


@pytest.mark.parametrize("case", ["resnet", "smoe"])
def test_a_run_that_is_taken_up_ends_alike(one: Path, store: Path, tmp_path: Path, case: str):
    for steps in (3, 8):
        recipe = made(store, case, 1, steps=steps)
        train(recipe, make_task(recipe), run_dir=tmp_path / "run", progress=False)
    check_same(tmp_path / "run", one / case, 0.0)


def test_bf16_with_sharded_optimiser_state_learns_alike(two: Path, store: Path, tmp_path: Path):
    recipe = bf16(store)
    train(recipe, make_task(recipe), run_dir=tmp_path / "run", progress=False)
    torch.testing.assert_close(curve(two / "bf16")[:4], curve(tmp_path / "run")[:4], rtol=5e-2, atol=0.0)
    weights = load_file(two / "bf16" / "weights.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if not name.endswith("renewals")} == {torch.float32}


def test_it_learns(one: Path):
    for case in ("resnet", "smoe"):
        losses = curve(one / case)
        assert float(losses[-2:].mean()) < float(losses[:2].mean())


def test_groups_that_do_not_fit_are_refused_before_training(store: Path, tmp_path: Path):
    recipe = made(store, "resnet", 8)
    with pytest.raises(ConfigError, match=r"model\.ghost_batch=2: must divide the micro-batch of 1 samples"):
        train(recipe, make_task(recipe), run_dir=tmp_path / "run", progress=False)


def test_pictures_are_drawn(one: Path, store: Path, tmp_path: Path):
    for case in ("smoe", "smoe_continuous"):
        recipe = made(store, case, 1)
        task = make_task(recipe)
        model = task.build_model()
        draw_pictures(task, one / case, model)
        drawn = {path.name for path in (one / case / "pictures").iterdir()}
        assert {"curves.png", "routing_0.png", "forecast.png"} <= drawn
