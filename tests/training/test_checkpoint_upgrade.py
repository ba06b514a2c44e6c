"""Checkpoints of the first format: named by training, read without running anything, turned into today's."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.errors import CheckpointError
from smoe_hpc.training import train
from smoe_hpc.training.checkpoint import OutdatedCheckpoint, load, read
from smoe_hpc.training.checkpoint.upgrade import upgrade

from . import first_format, toy

IDENTITY = {"recipe": "r", "grid": "g"}
TENSORS = {
    "model.weight": torch.arange(6.0).reshape(2, 3),
    "model.last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "model.half": torch.ones(2, 0, 3, dtype=torch.bfloat16),
    "model.count": torch.tensor(3),
    "routing.a": torch.ones(2, 2, dtype=torch.int64),
    "model.flag": torch.tensor([True, False]),
}


def old(path: Path, tensors: dict[str, Any] = TENSORS, step: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first_format.write(path, step, tensors, {"note": 0.1}, IDENTITY)
    return path


def reseal(path: Path, index: bytes) -> None:
    (path / ".metadata").write_bytes(index)
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"], body["files"]
    first_format.seal(path, body)


@pytest.mark.parametrize("early", [False, True], ids=["this_python", "early_3.11"])
def test_an_old_one_becomes_one_of_today_with_the_same_tensors(tmp_path: Path, early: bool) -> None:
    path = old(tmp_path / "step_7")
    if early:
        reseal(path, first_format.as_early_eleven((path / ".metadata").read_bytes()))
    with pytest.raises(OutdatedCheckpoint, match="smoe-hpc checkpoint upgrade OLD NEW"):
        read(path)
    assert upgrade(path, tmp_path / "new") == [tmp_path / "new"]
    saved = read(tmp_path / "new")
    assert (saved.step, saved.state, saved.identity) == (7, {"note": 0.1}, IDENTITY)
    found = load(saved)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    with pytest.raises(CheckpointError, match="new exists"):
        upgrade(path, tmp_path / "new")


def test_a_run_goes_on_from_upgraded_checkpoints_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train(toy.recipe(training__max_steps=16), toy.ToyTask(), run_dir=run, progress=False)
    for path in (run / "checkpoints").glob("step_*"):  # as the first version left it
        saved = read(path)
        tensors = load(saved)
        for file in path.iterdir():
            file.unlink()
        first_format.write(path, saved.step, tensors, saved.state, saved.identity)
    (run / "checkpoints.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_16 was written by an earlier version; `smoe-hpc checkpoint upgrade"):
        train(toy.recipe(), toy.ToyTask(), run_dir=run, progress=False)
    result = CliRunner().invoke(app, ["checkpoint", "upgrade", str(run), str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert f"put {tmp_path / 'new'} in the place of {run}" in result.stdout
    train(toy.recipe(), toy.ToyTask(), run_dir=tmp_path / "new", progress=False)
    train(toy.recipe(), toy.ToyTask(), run_dir=tmp_path / "whole", progress=False)
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Ran:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def index_of(path: Path) -> Any:
    return pickle.loads((path / ".metadata").read_bytes())


def evil_index(path: Path, mark: Path) -> bytes:
    return pickle.dumps(Ran(mark))


def evil_attribute(path: Path, mark: Path) -> bytes:
    class Asks:
        def __reduce__(self) -> Any:
            return getattr, (StorageMeta, "__init__")

    return pickle.dumps(Asks())


def evil_state(path: Path, mark: Path) -> bytes:
    index = index_of(path)
    index.storage_meta = Ran(mark)
    return pickle.dumps(index)


def put_code_in_place_of_a_tensor(path: Path, mark: Path, index: Any) -> None:
    with (path / "__0_0.distcp").open("ab") as file:
        at = file.tell()
        torch.save(Ran(mark), file)
        length = file.tell() - at
    for key, info in index.storage_data.items():
        if key.fqn == "model.weight":
            info.offset, info.length = at, length


def bytes_entry(path: Path, mark: Path) -> bytes:
    index = index_of(path)
    index.state_dict_metadata["model.weight"] = BytesStorageMetadata()
    put_code_in_place_of_a_tensor(path, mark, index)
    return pickle.dumps(index)


def code_in_a_tensor(path: Path, mark: Path) -> bytes:
    index = index_of(path)
    put_code_in_place_of_a_tensor(path, mark, index)
    return pickle.dumps(index)


def file_outside(path: Path, mark: Path) -> bytes:
    index = index_of(path)
    (path.parent / "outside.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../outside.distcp"
    return pickle.dumps(index)


def other_tensor(path: Path, mark: Path) -> bytes:
    index = index_of(path)
    index.state_dict_metadata["model.more"] = index.state_dict_metadata["model.weight"]
    return pickle.dumps(index)


def no_index(path: Path, mark: Path) -> bytes:
    return b"\x80\x04]."


def nested(path: Path, mark: Path) -> bytes:
    content = io.BytesIO()
    content.write(b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".")
    return content.getvalue()


@pytest.mark.parametrize(
    ("evil", "said"),
    [
        (evil_index, "names posix.system, which no index of tensors does"),
        (evil_attribute, "asks for the attribute '__init__'"),
        (evil_state, "names posix.system"),
        (bytes_entry, r"names torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
        (code_in_a_tensor, "model.weight cannot be read"),
        (file_outside, r"lies in '../outside.distcp', which is no file of the checkpoint"),
        (other_tensor, "index and manifest differ about 'model.more'"),
        (no_index, "is damaged"),
        (nested, "is damaged|differ"),
    ],
)
def test_an_old_one_that_would_run_code_or_leave_its_folder_is_refused(tmp_path: Path, evil: Any, said: str) -> None:
    path = old(tmp_path / "step_7")
    reseal(path, evil(path, tmp_path / "ran"))
    result = CliRunner().invoke(app, ["checkpoint", "upgrade", str(path), str(tmp_path / "new")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    with pytest.raises(CheckpointError, match=said):
        upgrade(path, tmp_path / "new")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is neither a checkpoint .* nor a run with checkpoints"):
        upgrade(tmp_path, tmp_path / "new")
