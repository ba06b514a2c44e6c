"""What a run says when the data it reads are at fault, and that how it reads them changes nothing."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import RunError
from smoe_hpc.training import evaluate, train
from smoe_hpc.training.batches import require_finite

from . import toy
from .conftest import start_two_ranks
from .stored import StoredTask, write_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Five days of hourly fields."""
    return write_store(tmp_path / "store.h5")


def test_a_value_that_is_not_finite_is_named_with_the_step_it_broke(store: Path, tmp_path: Path) -> None:
    item = int(StoredTask(store).samples("train").epoch_ids(0, 1)[3 * 8 + 5])  # step 4 of epoch 1
    row = item + 1
    others = StoredTask(store).samples("train").epoch_ids(0, 0)[: 8 * 8]
    first = [step for step in range(8) if {item, row} & set(others[8 * step : 8 * step + 8].tolist())]
    with h5py.File(store, "r+") as file:
        file["fields"][row, 0, 4, 2] = np.inf
    step = first[0] + 1 if first else 12
    with pytest.raises(RunError) as raised:
        train(toy.recipe(), StoredTask(store), run_dir=tmp_path / "run", progress=False)
    message = str(raised.value)
    assert f"at step {step} (epoch {0 if first else 1}): " in message
    time = np.datetime64("2019-03-01T00:00:00") + row * np.timedelta64(1, "h")
    assert f"{store} time {time}, channel 'heat': 1 value is not finite, at lat 4, lon 2; mend them or leave" in message
    assert "data verify" in message
    assert "\n" not in message


def test_data_may_move_between_the_parts_of_a_run(store: Path, tmp_path: Path) -> None:
    whole = train(toy.recipe(training__max_steps=12), StoredTask(store), run_dir=tmp_path / "whole", progress=False)
    first = toy.recipe(training__max_steps=6, data__store=str(store))
    train(first, StoredTask(store), run_dir=tmp_path / "run", progress=False)
    staged = tmp_path / "staged" / "other.h5"
    staged.parent.mkdir()
    shutil.copyfile(store, staged)
    store.unlink()
    moved = toy.recipe(training__max_steps=12, data__store=str(staged))
    assert train(moved, StoredTask(staged), run_dir=tmp_path / "run", progress=False) == whole
    weights = [(tmp_path / run / "weights.safetensors").read_bytes()[-400:] for run in ("whole", "run")]
    assert weights[0] == weights[1]
    assert str(staged) in (tmp_path / "run" / "config.yaml").read_text()


def spoil(store: Path, row: int) -> str:
    """Put a NaN into a row; its place in words."""
    with h5py.File(store, "r+") as file:
        file["fields"][row, 0, 4, 2] = np.nan
    time = np.datetime64("2019-03-01T00:00:00") + row * np.timedelta64(1, "h")
    return f"{store} time {time}, channel 'heat': 1 value is not finite, at lat 4, lon 2"


def test_a_value_that_is_not_finite_in_a_scored_split_is_named(store: Path, tmp_path: Path) -> None:
    train(toy.recipe(training__max_steps=6), StoredTask(store), run_dir=tmp_path / "whole", progress=False)
    where = spoil(store, 110)
    with pytest.raises(RunError) as raised:
        train(toy.recipe(training__max_steps=6), StoredTask(store), run_dir=tmp_path / "run", progress=False)
    assert str(raised.value).startswith(f"loss (all) on test is nan: the test data are at fault: {where}; mend them")
    assert not (tmp_path / "run" / "scores.json").exists()
    with pytest.raises(RunError, match=r"loss \(all\) on test is nan: the test data are at fault"):
        evaluate(tmp_path / "run", "test", task=StoredTask(store))
    with pytest.raises(RunError, match=r"belongs to other train data than .*store.h5 holds now; put its data back"):
        evaluate(tmp_path / "whole", "validation", task=StoredTask(store))
    where = spoil(store, 80)
    with pytest.raises(RunError) as raised:
        train(toy.recipe(), StoredTask(store), run_dir=tmp_path / "other", progress=False)
    message = str(raised.value)
    assert message.startswith("loss on validation is nan at step 5: checkpoint step_4 is from before; the validation data")
    assert f"at fault: {where}; mend them or leave that time out" in message
    assert "optimizer" not in message


def test_scores_of_a_model_that_diverged_are_refused(store: Path) -> None:
    samples = StoredTask(store).samples("test")
    require_finite({"all": {"loss": 1.0}}, samples, "test")
    with pytest.raises(RunError, match=r"rmse \(r1\) on test is inf: the test data are finite, so the model has diverged"):
        require_finite({"all": {"rmse": 1.0}, "r1": {"rmse": float("inf")}}, samples, "test")
    with pytest.raises(RunError, match=r"rmse \(all\) on test is nan: the model has diverged"):
        require_finite({"all": {"rmse": float("nan")}}, None, "test")  # of data that are not stored


@pytest.mark.parametrize("failing", [0, 1])
def test_one_ranks_failure_ends_the_others_with_its_message(store: Path, tmp_path: Path, failing: int) -> None:
    damaged = tmp_path / "damaged.h5"
    shutil.copy(store, damaged)
    with h5py.File(damaged) as file:
        places = [file["fields"].id.get_chunk_info_by_coord((row, 0, 0, 0)).byte_offset for row in range(30, 40)]
    content = bytearray(damaged.read_bytes())
    for place in places:
        content[place] ^= 1
    damaged.write_bytes(content)
    began = time.monotonic()
    processes = start_two_ranks("failing_rank", tmp_path / "run", failing, "store", store, damaged)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert time.monotonic() - began < 60
    own = said[failing].splitlines()[-1]
    assert "damaged.h5" in own
    assert own.startswith("error: ")
    assert said[1 - failing].splitlines()[-1] == f"error: rank {failing} failed: {own.removeprefix('error: ')}"
    assert "Traceback" not in "".join(said)
    assert "gloo" not in "".join(said)


@pytest.mark.parametrize("changes", [{"loader__workers": 3, "loader__prefetch": 4}, {"loader__verify": "all"}])
def test_how_batches_are_read_changes_nothing(store: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    for name, settings in (("one", {}), ("other", changes)):
        recipe = toy.recipe(training__epochs=2, **settings)
        train(recipe, StoredTask(store), run_dir=tmp_path / name, progress=False)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("smoe-prefetch", "smoe-read"))]
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.dali
def test_dali_and_threads_give_the_same_run(store: Path, tmp_path: Path) -> None:
    for backend in ("threads", "dali"):
        recipe = toy.recipe(training__epochs=2, loader__backend=backend)
        train(recipe, StoredTask(store), run_dir=tmp_path / backend, progress=False)
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (tmp_path / "threads" / name).read_bytes() == (tmp_path / "dali" / name).read_bytes()
