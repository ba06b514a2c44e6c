"""Files of a run that are damaged, missing or no files: noticed, and made again where that is possible."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from smoe_hpc.errors import CheckpointError, RunError
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.training import evaluate

from . import toy
from .conftest import environment
from .toy_runs import run_for, same

# -- log files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 40])
def test_timing_never_blocks(stopped: Path, whole: Path, content: bytes | None) -> None:
    timing = stopped / "timing.jsonl"
    timing.unlink()
    if content is not None:
        timing.write_bytes(content)
    run_for(stopped, 16)
    same(stopped, whole)


def test_where_metrics_lost_lines_an_earlier_checkpoint_serves(stopped: Path, whole: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    metrics = stopped / "metrics.jsonl"
    counted = json.loads((stopped / "checkpoints" / "step_12" / "manifest.json").read_text())["state"]["log"]["metrics"]
    metrics.write_bytes(metrics.read_bytes()[: counted - 1])
    run_for(stopped, 16)
    assert "metrics.jsonl has lost lines" in caplog.text
    same(stopped, whole)


def test_where_no_checkpoint_fits_the_metrics_that_is_an_error(stopped: Path) -> None:
    (stopped / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*metrics.jsonl has lost lines \(0 bytes of \d+\)"):
        run_for(stopped, 16)


def test_a_damaged_best_checkpoint_is_found_before_training(tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    changes = {"optimizer__lr": 30.0, "run__checkpoint_every": 2}  # so large a rate that the first validation stays the best
    run_for(tmp_path / "run", 16, **changes)
    (tmp_path / "run" / "finished.json").unlink()
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    best = json.loads((last / "manifest.json").read_text())["state"]["position"]["plateau"]["best_step"]
    assert best < 14
    (tmp_path / "run" / "checkpoints" / f"step_{best}" / "tensors_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"step_16 counts on a better one: .*step_{best}.* is missing"):
        run_for(tmp_path / "run", 20, **changes)


# -- what an ended run left -----------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def deep(path: Path) -> None:
    path.write_bytes(b"[" * 200_000)


@pytest.mark.parametrize("damage", [flip, empty, deep, Path.unlink])
@pytest.mark.parametrize("name", ["scores.json", "weights.safetensors", "finished.json"])
def test_what_an_ended_run_left_is_noticed_and_made_again(
    whole: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run / name)
    run_for(run, 16)
    same(run, whole)
    assert (run / "finished.json").read_bytes() == (whole / "finished.json").read_bytes()
    assert name in caplog.text or (name, damage) == ("finished.json", Path.unlink)


def test_pictures_are_not_drawn_from_other_weights(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    RunDirectory(run).check_weights()
    flip(run / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights.safetensors is not what was written; `smoe-hpc train`"):
        RunDirectory(run).check_weights()
    scores = json.loads((whole / "scores.json").read_text())
    assert evaluate(run, "test", task=toy.ToyTask()) == scores["test"]  # of the checkpoint


# -- killed before the first checkpoint -----------------------------------------------------------------------------------


def test_killed_before_its_first_checkpoint_it_says_that_it_starts_anew(tmp_path: Path, whole: Path) -> None:
    call = [sys.executable, "-m", "tests.training.toy", str(tmp_path / "run"), "training__max_steps=16"]
    slow = subprocess.Popen([*call, "--slow", "0.3"], env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    slow.send_signal(signal.SIGKILL)
    assert slow.stderr is not None
    assert "starts at step 0: a new run" in slow.stderr.read()
    slow.wait()
    again = subprocess.run(call, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert "at step 0" in again.stderr
    same(tmp_path / "run", whole)


# -- what somebody has put in the place of a run's files ------------------------------------------------------------------


def test_links_in_a_run_lead_to_no_writing_outside(stopped: Path, whole: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x" * 5000)
    for name in (".config.yaml.partial", ".scores.json.partial", ".finished.json.partial"):
        (stopped / name).symlink_to(precious)
    (stopped / "timing.jsonl").unlink()
    (stopped / "timing.jsonl").symlink_to(precious)
    run_for(stopped, 16)
    same(stopped, whole)
    assert not (stopped / "config.yaml").is_symlink()
    for name in ("lock", "metrics.jsonl"):
        (stopped / name).unlink()
        (stopped / name).symlink_to(precious)
        (stopped / "finished.json").unlink(missing_ok=True)
        with pytest.raises((RunError, CheckpointError), match=f"{name}.* is a link, not a regular file|has lost lines"):
            run_for(stopped, 16)
        (stopped / name).unlink()
    assert precious.read_text() == "x" * 5000


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_timing_that_is_no_file_is_told_and_blocks_nothing(stopped: Path, whole: Path, make, caplog) -> None:  # type: ignore[no-untyped-def]
    (stopped / "timing.jsonl").unlink()
    make(stopped / "timing.jsonl")
    os.mkfifo(stopped / ".config.yaml.partial")
    run_for(stopped, 16)
    same(stopped, whole)
    assert "no timing is written: " in caplog.text
    assert "not a regular file" in caplog.text
    assert list(RunDirectory(stopped).timing_events()) == []


def test_a_lock_that_is_no_file_is_named(stopped: Path) -> None:
    (stopped / "lock").unlink()
    os.mkfifo(stopped / "lock")
    with pytest.raises(RunError, match=r"lock is a FIFO, not a regular file; remove it, or choose another run\.root"):
        run_for(stopped, 16)


@pytest.mark.parametrize("scores", [{"validation": [1, 2]}, {"test": {"all": {"rmse": "x"}}}, {"test": {}}])
def test_scores_of_another_shape_are_made_again(tmp_path: Path, whole: Path, scores: dict, caplog) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(whole, tmp_path / "run")
    ended = json.loads((whole / "finished.json").read_text())
    ended = {name: value for name, value in ended.items() if name not in ("sha256", "files")}  # as early versions wrote it
    (tmp_path / "run" / "finished.json").write_text(json.dumps(ended))
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    run_for(tmp_path / "run", 16)
    same(tmp_path / "run", whole)
    assert "it holds no scores" in caplog.text
