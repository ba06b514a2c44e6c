"""Checkpoints that somebody made to do harm: each is refused in one line, none runs code, leaves its folder or hangs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from smoe_hpc.errors import CheckpointError
from smoe_hpc.files import writing
from smoe_hpc.training import evaluate, train
from smoe_hpc.training.checkpoint import load, read
from smoe_hpc.training.checkpoint.manifest import LARGEST

from . import toy

SHARD = "tensors_00000.safetensors"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A checkpoint with two tensors."""
    path = tmp_path / "step_1"
    path.mkdir()
    save_file({"model.a": torch.ones(2), "model.b": torch.ones(3)}, path / SHARD)
    seal(path, {})
    return path


def seal(path: Path, changes: dict[str, Any]) -> None:
    """Write a manifest with a right checksum, and these changes."""
    body = {
        "format": 2,
        "step": 1,
        "identity": {"grid": "g"},
        "state": {},
        "tensors": {"model.a": [[2], "float32", SHARD], "model.b": [[3], "float32", SHARD]},
        "files": {SHARD: list(writing.digest_of(path / SHARD))},
    }
    body.update(changes)
    writing.write_json(path / "manifest.json", {**body, "sha256": writing.sha256_of_json(body)})


def tensors(entry: Any) -> dict[str, Any]:
    return {"tensors": {"model.a": entry, "model.b": [[3], "float32", SHARD]}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (tensors([[2], "load", SHARD]), "tensor 'model.a' is not what a checkpoint has"),
        (tensors([[2], "float32", "../x"]), "no checksum of '../x'"),
        (tensors([[2], "float32", ["x"]]), "tensor 'model.a'"),
        (tensors([[-2], "float32", SHARD]), "tensor 'model.a'"),
        (tensors([[10**15], "float32", SHARD]), "model.a is float32 \\[2\\], its manifest differs"),
        (tensors([[2], "float64", SHARD]), "model.a is float32 \\[2\\], its manifest differs"),
        ({"tensors": {"model.c": [[2], "float32", SHARD]}}, "cannot be loaded: .*model.c"),
        ({"tensors": []}, "is damaged"),
        ({"files": {"../outside": [1, "0" * 64]}}, "names the file '../outside'; files of a checkpoint lie inside"),
        ({"files": {"/etc/passwd": [1, "0" * 64]}}, "names the file '/etc/passwd'"),
        ({"files": {"..": [1, "0" * 64]}}, "names the file '..'"),
        ({"files": {SHARD: "x"}}, f"file '{SHARD}'"),
        ({"step": "1"}, "its step"),
        ({"step": True}, "its step"),
        ({"state": None}, "its state"),
        ({"identity": {"grid": 1}}, "its identity"),
        ({"format": "2"}, "it has format '2'"),
        ({"format": 3}, "it has format 3"),
    ],
)
def test_a_manifest_with_entries_that_no_checkpoint_has(made: Path, changes: dict[str, Any], said: str) -> None:
    seal(made, changes)
    with pytest.raises(CheckpointError, match=said):
        load(read(made))


def put(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def link_outside(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_outside, link_to_itself])
def test_only_regular_files_are_opened(made: Path, name: str, make: Callable[[Path], object]) -> None:
    put(made / name, make)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
        read(made)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"[" * 200_000, b'{"sha256": NaN}', bytes(LARGEST + 1)],
    ids=["empty", "list", "number", "text", "nothing", "bytes", "deep", "nan", "large"],
)
def test_a_manifest_that_is_none(made: Path, content: bytes) -> None:
    (made / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        read(made)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (2**63).to_bytes(8, "little"), b"\x10" + bytes(7) + b"{" * 16])
def test_a_shard_that_is_none(made: Path, content: bytes) -> None:
    (made / SHARD).write_bytes(content)
    seal(made, {})
    with pytest.raises(CheckpointError, match=rf"{SHARD} cannot be loaded"):
        load(read(made))


def with_state(path: Path, state: dict[str, Any]) -> None:
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    body["state"] = state
    writing.write_json(path / "manifest.json", {**body, "sha256": writing.sha256_of_json(body)})


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"position": 3, "log": {}},
        {"position": {"step": "x", "plateau": {}}, "log": {}},
        {"position": {"stop": 1, "plateau": {}}, "log": {}},
        {"position": {"plateau": {"best_step": -4}}, "log": {}},
        {"position": {"plateau": {"best": "much"}}, "log": {}},
        {"position": {"plateau": {}}, "log": {"metrics": "all"}},
    ],
)
def test_a_state_that_is_none_of_a_run(tmp_path: Path, state: dict[str, Any]) -> None:
    run = tmp_path / "run"
    train(toy.recipe(training__max_steps=4), toy.ToyTask(), run_dir=run, progress=False)
    (run / "finished.json").unlink()
    with_state(run / "checkpoints" / "step_4", state)
    with pytest.raises(CheckpointError, match="step_4 holds no state of a run"):
        train(toy.recipe(training__max_steps=8), toy.ToyTask(), run_dir=run, progress=False)
    with pytest.raises(CheckpointError, match="step_4 holds no state of a run"):
        evaluate(run, "test", task=toy.ToyTask())


def test_a_checkpoint_under_the_name_of_another_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(toy.recipe(training__max_steps=4), toy.ToyTask(), run_dir=run, progress=False)
    shutil.move(run / "checkpoints" / "step_4", run / "checkpoints" / "step_5")
    with pytest.raises(CheckpointError, match="step_5 holds step 4; give the folder its name back"):
        train(toy.recipe(training__max_steps=8), toy.ToyTask(), run_dir=run, progress=False)
