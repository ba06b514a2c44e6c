"""A run on one GPU, and on two over NCCL, against the same run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from . import toy
from .conftest import Launch

CASES = {
    "float32": ("conv", {"run__checkpoint_every": 1000, "training__validate_every": None}),
    "smoe": ("smoe", {"run__checkpoint_every": 1000, "training__validate_every": None}),
    "bf16": ("conv", {"training__precision": "bf16", "run__checkpoint_every": 1000, "training__validate_every": None}),
    "zero1": ("conv", {"training__zero_stage": 1, "run__checkpoint_every": 1000, "training__validate_every": None}),
}
TOLERANCE = {"float32": 1e-4, "smoe": 1e-4, "bf16": 5e-2, "zero1": 1e-4}


def curves(launch: Launch, folder: Path, processes: int, gpus: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(CASES))
    launch("matrix.py", folder, folder / "cases.json", processes=processes, gpus=gpus)
    losses = {}
    for case in CASES:
        lines = toy.read_lines(folder / case / "metrics.jsonl")
        losses[case] = torch.tensor([line["loss"] for line in lines if line["event"] == "step"])
        assert json.loads((folder / case / "scores.json").read_text())["test"]
    return losses


@pytest.mark.gpu
def test_one_gpu_learns_what_a_cpu_does(launch: Launch, tmp_path: Path) -> None:
    cpu = curves(launch, tmp_path / "cpu", 1, "")
    gpu = curves(launch, tmp_path / "gpu", 1, "0")
    for case in CASES:
        torch.testing.assert_close(gpu[case][:30], cpu[case][:30], rtol=TOLERANCE[case], atol=0.0, msg=case)


@pytest.mark.multigpu
def test_two_gpus_learn_what_one_does(launch: Launch, tmp_path: Path) -> None:
    one = curves(launch, tmp_path / "one", 1, "0")
    two = curves(launch, tmp_path / "two", 2, "0,1")
    for case in CASES:
        torch.testing.assert_close(two[case][:30], one[case][:30], rtol=TOLERANCE[case], atol=0.0, msg=case)
