"""Whole runs: their folder, how they end, what goes wrong."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smoe_hpc.errors import CheckpointError, DataError, RunError
from smoe_hpc.io import Grid, Store, StoreWriter
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.training import evaluate, train

from . import toy


def events(run: Path, kind: str) -> list[dict]:  # type: ignore[type-arg]
    return [line for line in toy.read_lines(run / "metrics.jsonl") if line["event"] == kind]


def quiet_train(run: Path, kind: str = "conv", **changes: object) -> dict:  # type: ignore[type-arg]
    return train(toy.recipe(**changes), toy.ToyTask(kind), run_dir=run, progress=False, draw=toy.draw)


def test_a_run_leaves_scores_curves_weights_and_pictures(tmp_path: Path) -> None:
    scores = quiet_train(tmp_path)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"validation", "test"}
    assert [line["step"] for line in events(tmp_path, "step")] == list(range(1, 37))
    assert [line["step"] for line in events(tmp_path, "validation")] == [5, 10, 15, 20, 25, 30, 35, 36]
    epoch = [line["loss"] for line in events(tmp_path, "step")][:12]
    assert events(tmp_path, "epoch")[0]["loss"] == pytest.approx(sum(epoch) / 12)
    best = min(line["scores"]["all"]["loss"] for line in events(tmp_path, "validation"))
    assert scores["validation"]["all"]["loss"] == best
    assert evaluate(tmp_path, "test", task=toy.ToyTask()) == scores["test"]
    assert (tmp_path / "drawn").exists()
    model = toy.ToyTask().build_model()
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))


def test_a_run_that_has_ended_is_not_trained_again_unless_it_may_go_on_longer(tmp_path: Path) -> None:
    first = quiet_train(tmp_path / "a", training__epochs=2)
    changed = (tmp_path / "a" / "metrics.jsonl").stat().st_mtime_ns
    assert quiet_train(tmp_path / "a", training__epochs=2) == first
    assert (tmp_path / "a" / "metrics.jsonl").stat().st_mtime_ns == changed
    assert quiet_train(tmp_path / "a") == quiet_train(tmp_path / "b")
    for name in ("metrics.jsonl", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def contents(run: Path) -> dict[str, bytes]:
    """What a run's folder holds, but for its lock."""
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_run_that_went_beyond_the_limit_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    quiet_train(tmp_path, training__max_steps=20)
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"at step 20 in epoch 1, beyond training.max_steps=10; .*--run-name, or .*=20 or more"):
        quiet_train(tmp_path, training__max_steps=10)
    with pytest.raises(RunError, match=r"beyond training.epochs=1; .*training.epochs=2 or more"):
        quiet_train(tmp_path, training__epochs=1)
    with pytest.raises(RunError, match=r"beyond training.epochs=1"):  # the limit at which it ended is the same
        quiet_train(tmp_path, training__epochs=1, training__max_steps=20)
    assert contents(tmp_path) == before
    (tmp_path / "finished.json").unlink()  # a run that was stopped there
    with pytest.raises(RunError, match=r"beyond training.max_steps=10"):
        quiet_train(tmp_path, training__max_steps=10)
    assert quiet_train(tmp_path, training__max_steps=20) == json.loads((tmp_path / "scores.json").read_text())


def stored_task(path: Path, seed: int = 0, last: float = 0.0) -> toy.ToyTask:
    """A task whose samples have stores; its test split's was made with this seed and holds this value at its end."""
    task = toy.ToyTask()
    for split in ("train", "validation", "test"):
        fields = np.zeros((3, 1, *toy.GRID))
        fields[2, 0, -1, -1] = last if split == "test" else 0.0
        coords = {"run": np.arange(3), "step": np.arange(3)}
        about: Any = {"attributes": {"seed": seed if split == "test" else 0}, "coords": coords, "overwrite": True}
        with StoreWriter(path / f"{split}.h5", Grid.plane(*toy.GRID), ["heat"], ["1"], **about) as writer:
            writer.write(0, fields)
        task.samples(split).store = Store(path / f"{split}.h5")
    return task


@pytest.mark.parametrize("steps", [12, 14], ids=["finished", "resumed"])
@pytest.mark.parametrize("changes", [{"seed": 1}, {"last": 1e-3}], ids=["attribute", "field"])
def test_other_data_are_refused(tmp_path: Path, changes: dict[str, Any], steps: int) -> None:
    first, then = toy.recipe(training__max_steps=12), toy.recipe(training__max_steps=steps)
    train(first, stored_task(tmp_path), run_dir=tmp_path / "run", progress=False)
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"other test data than .*test.h5 holds now; put its data back, or .*--run-name"):
        train(then, stored_task(tmp_path, **changes), run_dir=tmp_path / "run", progress=False)
    assert contents(tmp_path / "run") == before
    train(then, stored_task(tmp_path), run_dir=tmp_path / "run", progress=False)


def test_another_number_of_samples_is_refused_without_a_store_too(tmp_path: Path) -> None:
    quiet_train(tmp_path, training__max_steps=20)
    with pytest.raises(RunError, match=r"step 8 of epoch 1, is impossible in epochs of 6 steps: .*the 50 there"):
        train(toy.recipe(), toy.ToyTask(train_samples=50), run_dir=tmp_path, progress=False)


def test_buffers_are_kept(tmp_path: Path) -> None:
    quiet_train(tmp_path / "whole", "batch")
    quiet_train(tmp_path / "stopped", "batch", training__max_steps=14)
    quiet_train(tmp_path / "stopped", "batch")
    one, other = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "stopped"))
    assert "1.running_mean" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_recipe_is_refused_and_its_keys_are_named(tmp_path: Path) -> None:
    quiet_train(tmp_path, training__max_steps=4)
    with pytest.raises(RunError, match=r"optimizer.lr=0.02 \(there: 0.01\), training.seed=1 \(there: 0\); choose another"):
        quiet_train(tmp_path, optimizer__lr=0.02, training__seed=1)
    quiet_train(tmp_path, training__max_steps=5, run__keep=1)
    with pytest.raises(RunError, match="holds a run"):
        train(toy.recipe(training__max_steps=5, run__keep=1), toy.ToyTask(), run_dir=tmp_path, resume=False)


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    hold = (
        "import sys, smoe_hpc.runs.directory as d, pathlib\n"
        "with d.RunDirectory(pathlib.Path(sys.argv[1])).locked():\n  print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=rf"in use by process {process.pid} on .*choose another name"):
        quiet_train(tmp_path)
    process.kill()  # the lock goes with its process
    process.wait()
    with RunDirectory(tmp_path).locked():
        pass


def test_who_merely_looks_at_a_lock_keeps_no_run_from_starting(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        leaves = threading.Timer(0.3, fcntl.flock, (looking, fcntl.LOCK_UN))
        leaves.start()
        with RunDirectory(tmp_path).locked():
            leaves.join()


def test_what_is_not_a_run_has_no_scores(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        evaluate(tmp_path, "test", task=toy.ToyTask())
    RunDirectory(tmp_path).claim(toy.recipe())
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        evaluate(tmp_path, "test", task=toy.ToyTask())


def test_a_loss_that_is_not_finite_names_the_step_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"loss is nan at step 7 \(epoch 0\): checkpoint step_5 is from before; lower"):
        quiet_train(tmp_path, "nan")
    assert (tmp_path / "checkpoints" / "step_5").exists()
    assert [line["step"] for line in events(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "scores.json").exists()


def test_training_ends_early_at_a_score_and_after_flat_validations(tmp_path: Path) -> None:
    quiet_train(tmp_path / "score", training__stop_at_score=0.3)
    assert events(tmp_path / "score", "validation")[-1]["scores"]["all"]["loss"] <= 0.3
    assert events(tmp_path / "score", "validation")[-2]["scores"]["all"]["loss"] > 0.3
    quiet = toy.recipe(optimizer__lr=1e-12, training__epochs=50)
    flat = replace(quiet, schedule=replace(quiet.schedule, early_stop=4, min_delta=0.5, patience=2, factor=0.5))
    train(flat, toy.ToyTask(), run_dir=tmp_path / "flat", progress=False)
    rates = [line["lr"]["biases"] / 1e-12 for line in events(tmp_path / "flat", "validation")]
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5]  # of the steps before; the fifth validation ended it
    assert json.loads((tmp_path / "flat" / "finished.json").read_text())["reason"] == "early_stop"


def test_few_samples_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not fill one batch"):
        quiet_train(tmp_path, training__batch=128)


def test_metrics_of_few_steps_and_tensorboard(tmp_path: Path) -> None:
    quiet_train(tmp_path, "smoe", run__log_every=6, run__tensorboard=True, training__max_steps=20)
    assert [line["step"] for line in events(tmp_path, "step")] == [6, 12, 18]
    assert {"loss", "routing_loss", "selections_changed", "load_min", "load_max"} <= set(events(tmp_path, "step")[0])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_pipe_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("smoe_hpc.training.progress._LINES", 0.0)
    train(toy.recipe(training__max_steps=10), toy.ToyTask(), run_dir=tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert any("samples/s, data wait" in line and "step 3/10" in line for line in said)
    assert any("validation loss" in line for line in said)
    assert any(line.endswith(", the best so far") for line in said)


def test_the_best_score_stays_beside_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a rate at which steps go too far."""
    train(toy.recipe(training__max_steps=8, training__validate_every=1, optimizer__lr=30.0), toy.ToyTask(), run_dir=tmp_path)
    said = capsys.readouterr().err.splitlines()
    reached = [(event["scores"]["all"]["loss"], event["step"], event["best"]) for event in events(tmp_path, "validation")]
    for number, (_, step, best) in enumerate(reached):
        value, where = min((loss, at) for loss, at, _ in reached[: number + 1])
        assert best == {"score": "loss", "value": value, "step": where}
        words = "the best so far" if where == step else f"best {value:.6g} at step {where}"
        assert any(f": step {step}, epoch" in line and line.endswith(words) for line in said)
    assert any(best["step"] < step for _, step, best in reached)
    assert not any("\x1b" in line for line in said)
