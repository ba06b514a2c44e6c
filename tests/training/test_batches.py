"""What a run says when the data it reads are at fault, and that how it reads them changes nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import RunError
from smoe_hpc.io import Grid, Store, StoreWriter
from smoe_hpc.io.pipeline import Samples
from smoe_hpc.io.samples import Split, Window
from smoe_hpc.training import train

from . import toy

DAYS = {"train": "2019-03-01/2019-03-03", "validation": "2019-03-04/2019-03-04", "test": "2019-03-05/2019-03-05"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Five days of hourly fields."""
    path = tmp_path / "store.h5"
    times = np.datetime64("2019-03-01T00") + np.arange(120) * np.timedelta64(1, "h")
    fields = np.random.default_rng(0).normal(size=(120, 1, *toy.GRID)).astype(np.float32)
    with StoreWriter(path, Grid.plane(*toy.GRID), ["heat"], ["K"], coords={"time": times}) as writer:
        writer.write(0, fields)
    return path


class StoredTask(toy.ToyTask):
    def __init__(self, path: Path) -> None:
        super().__init__()
        store = Store(path)
        self._samples = {split: Samples(store, Window((0,), 1), Split(days)) for split, days in DAYS.items()}  # type: ignore[misc]


def test_a_value_that_is_not_finite_is_named_with_the_step_it_broke(store: Path, tmp_path: Path) -> None:
    item = int(StoredTask(store).samples("train").epoch_items(0, 1)[3 * 8 + 5])  # type: ignore[attr-defined]  # step 4 of epoch 1
    row = item + 1
    others = StoredTask(store).samples("train").epoch_items(0, 0)[: 8 * 8]  # type: ignore[attr-defined]
    first = [step for step in range(8) if {item, row} & set(others[8 * step : 8 * step + 8].tolist())]
    with h5py.File(store, "r+") as file:
        file["fields"][row, 0, 4, 2] = np.inf
    step = first[0] + 1 if first else 12
    with pytest.raises(RunError) as raised:
        train(toy.recipe(), StoredTask(store), run_dir=tmp_path / "run", progress=False)
    message = str(raised.value)
    assert f"at step {step} (epoch {0 if first else 1}): " in message
    time = np.datetime64("2019-03-01T00:00:00") + row * np.timedelta64(1, "h")
    assert f"{store} time {time}, channel heat, latitude 4, longitude 2 holds inf; mend them or leave that time" in message
    assert "data verify" in message
    assert "\n" not in message


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
    for front in ("plain", "dali"):
        recipe = toy.recipe(training__epochs=2, loader__front=front)
        train(recipe, StoredTask(store), run_dir=tmp_path / front, progress=False)
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "dali" / name).read_bytes()
