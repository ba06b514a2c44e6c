from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoe_hpc.errors import CheckpointError
from smoe_hpc.training import train
from smoe_hpc.training.checkpoint import Checkpoints, check_fits, load, read, shards
from smoe_hpc.training.processes import Processes, join

from . import toy
from .conftest import Launch

IDENTITY = {"recipe": "r", "grid": "g"}


@pytest.fixture
def processes() -> Processes:
    return join()


def tensors(scale: float = 1.0, size: int = 5) -> dict[str, torch.Tensor]:
    return {
        "model.weight": scale * torch.arange(size, dtype=torch.float32),
        "model.count": torch.tensor(3),
        "model.half": torch.ones(2, 0, 3, dtype=torch.bfloat16),
        "routing.a": torch.ones(2, 2, dtype=torch.int64),
        "model.flag": torch.tensor([True, False]),
        "model.double": torch.ones(3, dtype=torch.float64),
    }


def kept(folder: Path, processes: Processes, keep: int = 2) -> Checkpoints:
    folder.mkdir(exist_ok=True)
    return Checkpoints(folder, processes, keep)


def test_what_is_saved_comes_back(tmp_path: Path, processes: Processes) -> None:
    store = kept(tmp_path, processes)
    store.save(7, tensors(), {"note": 0.1}, IDENTITY, None)
    saved = store.newest()
    assert saved is not None
    assert (saved.step, saved.state, saved.identity) == (7, {"note": 0.1}, IDENTITY)
    for name, tensor in load(saved).items():
        assert torch.equal(tensor, tensors()[name])
        assert tensor.dtype == tensors()[name].dtype
    assert set(load(saved, lambda name: name.startswith("routing."))) == {"routing.a"}


def test_the_newest_and_the_best_stay(tmp_path: Path, processes: Processes) -> None:
    store = kept(tmp_path, processes)
    for step in range(1, 7):
        store.save(step, tensors(), {}, IDENTITY, best=min(step, 2))
    assert store.steps() == [2, 5, 6]


def damage_nothing(path: Path) -> None:
    path.unlink()


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_nothing, damage_end, damage_bit])
@pytest.mark.parametrize("name", ["manifest.json", "tensors_00000.safetensors"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, processes, damage, name, caplog) -> None:  # type: ignore[no-untyped-def]
    store = kept(tmp_path, processes)
    store.save(1, tensors(1.0), {}, IDENTITY, None)
    store.save(2, tensors(2.0), {}, IDENTITY, None)
    damage(tmp_path / "step_2" / name)
    saved = store.newest()
    assert saved is not None
    assert saved.step == 1
    assert name in caplog.text
    damage(tmp_path / "step_1" / name)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        store.newest()


def test_a_run_with_a_damaged_newest_checkpoint_ends_the_same(tmp_path: Path, processes: Processes) -> None:
    train(toy.recipe(), toy.ToyTask(), run_dir=tmp_path / "whole", progress=False)
    run = tmp_path / "damaged"
    train(toy.recipe(training__max_steps=16), toy.ToyTask(), run_dir=run, progress=False)
    damage_bit(run / "checkpoints" / "step_16" / "tensors_00000.safetensors")
    train(toy.recipe(), toy.ToyTask(), run_dir=run, progress=False)
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_killed_process_left_is_removed(tmp_path: Path, processes: Processes) -> None:
    store = kept(tmp_path, processes)
    (tmp_path / ".partial_step_9").mkdir()
    assert store.newest() is None
    store.clear_partial()
    assert not list(tmp_path.iterdir())


def test_those_of_later_steps_go_once_the_run_went_on_from_an_earlier_one(tmp_path: Path, processes: Processes) -> None:
    store = kept(tmp_path, processes)
    for step in (4, 8, 12, 16):
        store.save(step, tensors(), {}, IDENTITY, best=4)
    assert store.steps() == [4, 12, 16]
    store.save(13, tensors(), {}, IDENTITY, best=4)  # it went on from step 12: that of step 16 could not be used
    assert store.steps() == [4, 12, 13]


def test_the_first_one_that_a_process_writes_is_read_back(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write

    def wrong(path: Path, named: dict[str, torch.Tensor]) -> None:
        write(path, {**named, "model.weight": named["model.weight"] + 1})

    store = kept(tmp_path, processes)
    monkeypatch.setattr(shards, "write", wrong)
    with pytest.raises(CheckpointError, match=r"step_1 was not written .*reading it back gives another model.weight"):
        store.save(1, tensors(), {}, IDENTITY, None)
    assert store.steps() == []
    monkeypatch.setattr(shards, "write", write)
    store.save(1, tensors(), {}, IDENTITY, None)
    assert store.steps() == [1]


def test_tensors_that_share_memory_and_views_are_kept_whole(tmp_path: Path, processes: Processes) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    given = {"a": whole, "b": whole, "row": whole[1], "column": whole[:, 1], "last": whole.t()}
    kept(tmp_path, processes).save(1, given, {}, IDENTITY, None)
    found = load(read(tmp_path / "step_1"))
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_a_dtype_that_cannot_be_kept_is_named(tmp_path: Path, processes: Processes) -> None:
    with pytest.raises(CheckpointError, match=r"model.phase is torch.complex64, which a checkpoint does not keep"):
        kept(tmp_path, processes).save(1, {"model.phase": torch.zeros(2, dtype=torch.complex64)}, {}, IDENTITY, None)


def test_the_ranks_share_the_writing_by_bytes() -> None:
    sizes = {"large": 10, **{f"small{i}": 3 for i in range(4)}}
    plan = shards.assign(sizes, ranks=2, shard=6, worth=4)
    assert plan == [
        {"tensors_00000.safetensors": ["large"]},
        {"tensors_00001.safetensors": ["small0", "small1"], "tensors_00002.safetensors": ["small2", "small3"]},
    ]
    assert shards.assign(sizes, ranks=3, worth=100) == [{"tensors_00000.safetensors": ["large", *list(sizes)[1:]]}, {}, {}]
    assert shards.assign({}, ranks=2) == [{}, {}]


def test_another_model_or_grid_is_named(tmp_path: Path, processes: Processes) -> None:
    store = kept(tmp_path, processes)
    store.save(1, tensors(), {}, IDENTITY, None)
    saved = store.newest()
    assert saved is not None
    model = {name: t for name, t in tensors(size=4).items() if name.startswith("model.") and name != "model.count"}
    with pytest.raises(CheckpointError, match=r"count too many; weight is \[5\] and should be \[4\]"):
        check_fits(saved, model, "model.", "g")
    with pytest.raises(CheckpointError, match="lacks extra"):
        check_fits(saved, {**model, "model.extra": torch.ones(1)}, "model.", "g")
    with pytest.raises(CheckpointError, match="grid g, the run has h"):
        check_fits(saved, model, "model.", "h")


def test_a_run_refuses_the_checkpoint_of_another_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(toy.recipe(training__max_steps=4), toy.ToyTask(), run_dir=run, progress=False)
    with pytest.raises(CheckpointError, match=r"another model: 0.weight is \[3, 1, 3, 3\] and should be \[5, 1, 3, 3\]"):
        train(toy.recipe(), toy.ToyTask(width=5), run_dir=run, progress=False)
    with pytest.raises(CheckpointError, match=r"another model: it lacks 0.gate|another model: it lacks 0.weight|it lacks"):
        train(toy.recipe(), toy.ToyTask("smoe"), run_dir=run, progress=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_on_a_full_disk_the_checkpoint_before_is_intact(small_disk: Path, processes: Processes) -> None:
    run = small_disk / "run"
    train(toy.recipe(training__max_steps=8), toy.ToyTask(), run_dir=run, progress=False)
    filler = small_disk / "filler"
    fill(filler)
    with pytest.raises(CheckpointError, match=r"(?s)was not written.*disk is full.*step_8 is intact"):
        kept(run / "checkpoints", processes).save(12, tensors(), {}, IDENTITY, None)
    assert read(run / "checkpoints" / "step_8").step == 8
    filler.unlink()
    train(toy.recipe(), toy.ToyTask(), run_dir=run, progress=False)
    whole = small_disk.parent / "whole"
    train(toy.recipe(), toy.ToyTask(), run_dir=whole, progress=False)
    one, other = (load_file(path / "weights.safetensors") for path in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_share_the_writing_and_fail_together(launch: Launch, tmp_path: Path) -> None:
    said = launch("two_writers.py", tmp_path / "checkpoints", processes=2).stdout
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*/*")) == [
        "manifest.json",
        "tensors_00000.safetensors",
        "tensors_00001.safetensors",
    ]
    assert re.search(r"rank 0: checkpoint step_2 was not written .*rank 1: .*No space left.*step_1 is intact", said)
    assert re.search(r"rank 1: checkpoint step_2 was not written .*step_1 is intact", said)
