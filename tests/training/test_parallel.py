"""Two processes against one with the same global batch, for every ZeRO stage, accumulation and precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoe_hpc.config import Gate, Model, RoutingLoss
from smoe_hpc.errors import ConfigError
from smoe_hpc.training import train

from . import toy
from .conftest import Launch

QUIET = {"run__checkpoint_every": 1000, "training__validate_every": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float64": ("conv", {"training__precision": "float64"}),
    "float64_smoe": ("smoe", {"training__precision": "float64", "training__accumulation": 2}),
    **{
        f"float64_{kind}_accumulation{accumulation}": (
            kind,
            {"training__precision": "float64", "training__accumulation": accumulation, **QUIET},
        )
        for kind in ("smoe_conv_gate", "smoe_per_sample", "smoe_running_mean")
        for accumulation in (1, 2)
    },
    **{
        f"zero{stage}_accumulation{accumulation}_{kind}": (
            "conv",
            {
                "training__zero_stage": stage,
                "training__accumulation": accumulation,
                "training__epochs": 5,
                "optimizer__kind": kind,
                **QUIET,
            },
        )
        for stage in (0, 1, 2)
        for accumulation, kind in ((1, "adam"), (2, "sgd"), (4, "adam"))
    },
    "bf16_zero1": ("conv", {"training__precision": "bf16", "training__zero_stage": 1, "training__epochs": 1, **QUIET}),
    "smoe_zero1": ("smoe", {"training__zero_stage": 1, **QUIET}),
}


@pytest.fixture(scope="module")
def two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "cases.json").write_text(json.dumps(CASES))
    launch("matrix.py", folder, folder / "cases.json", processes=2)
    return folder


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in toy.read_lines(run / "metrics.jsonl") if line["event"] == "step"]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(two: Path, tmp_path: Path, case: str) -> None:
    kind, changes = CASES[case]
    scores = train(toy.recipe(**changes), toy.ToyTask(kind), run_dir=tmp_path / "one", progress=False)
    tolerance = 1e-12 if "float64" in case else 2e-2 if "bf16" in case else 1e-6
    one_curve, two_curve = (torch.tensor(curve(run), dtype=torch.float64) for run in (tmp_path / "one", two / case))
    torch.testing.assert_close(two_curve[:50], one_curve[:50], rtol=tolerance, atol=0.0)
    if "float64" in case:
        torch.testing.assert_close(two_curve, one_curve, rtol=1e-12, atol=0.0)
    two_scores = json.loads((two / case / "scores.json").read_text())
    assert two_scores["test"]["all"]["loss"] == pytest.approx(scores["test"]["all"]["loss"], rel=max(tolerance, 1e-5))
    weights = load_file(two / case / "weights.safetensors")
    floating = {w.dtype for w in weights.values() if w.is_floating_point()}  # a running mean counts its steps besides
    assert floating == {torch.float64 if "float64" in case else torch.float32}


@pytest.mark.parametrize(
    "model",
    [
        Model(gate=Gate(kind="coordconv_multi")),
        Model(gate=Gate(kind="conv"), routing_loss=RoutingLoss(importance=0.1)),
    ],
)
def test_what_depends_on_how_a_batch_is_shared_is_not_trained(tmp_path: Path, model: Model) -> None:
    recipe = toy.recipe(training__accumulation=2, model=model)
    with pytest.raises(ConfigError, match=r"1 process x training\.accumulation=2"):
        train(recipe, toy.ToyTask("smoe"), run_dir=tmp_path / "run", progress=False)
