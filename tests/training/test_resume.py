from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoe_hpc.training import RunInterrupted, train

from . import toy
from .conftest import Launch, command, environment


def same_results(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_killed_at_ten_random_moments_it_ends_the_same_to_the_bit(launch: Launch, tmp_path: Path) -> None:
    found = json.loads(launch("killer.py", tmp_path, 10, 3).stdout.splitlines()[-1])
    same_results(tmp_path / "whole", tmp_path / "killed")
    assert len({tuple(names) for names in found}) > 2, found  # the kills fell between different checkpoints
    steps = [line["step"] for line in toy.read_lines(tmp_path / "killed" / "metrics.jsonl") if line["event"] == "step"]
    assert steps == list(range(1, 73))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".partial*"))


def stop(run: Path, changes: list[str], name: str, checkpoint: int) -> None:
    """Train on two slow ranks, send one of them a signal once a checkpoint is there, and see both leave."""
    process = subprocess.Popen(
        command("toy.py", run, "--slow", "0.1", *changes, processes=2),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any(int(path.name[5:]) >= checkpoint for path in (run / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank_0 = int((run / "lock").read_text().split()[1])
    os.kill(rank_0, getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert said.count("the same command goes on from there") == 2, said
    assert said.count(name) >= 1
    assert not (run / "scores.json").exists()


def test_a_signal_to_one_of_two_ranks_stops_both_and_the_run_goes_on(launch: Launch, tmp_path: Path) -> None:
    changes = ["training__epochs=2", "training__zero_stage=1"]
    launch("toy.py", tmp_path / "whole", *changes, processes=2)
    stop(tmp_path / "stopped", changes, "SIGTERM", 4)
    stop(tmp_path / "stopped", changes, "SIGUSR1", 12)
    launch("toy.py", tmp_path / "stopped", *changes, processes=2)
    same_results(tmp_path / "whole", tmp_path / "stopped")


def test_the_status_of_a_stopped_run_is_its_own(tmp_path: Path) -> None:
    class Asking(toy.ToyTask):
        def loss(self, output, batch):  # type: ignore[no-untyped-def]
            if self._calls == 6:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().loss(output, batch)

    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(RunInterrupted, match=r"\(SIGUSR1\) after step 7, which is saved") as stopped:
        train(toy.recipe(), Asking(), run_dir=tmp_path / "run", progress=False)
    assert stopped.value.exit_status == 75
    assert signal.getsignal(signal.SIGUSR1) is before
    train(toy.recipe(), toy.ToyTask(), run_dir=tmp_path / "run", progress=False)
    train(toy.recipe(), toy.ToyTask(), run_dir=tmp_path / "whole", progress=False)
    same_results(tmp_path / "whole", tmp_path / "run")


def test_a_run_on_two_ranks_with_zero_goes_on_with_one(launch: Launch, tmp_path: Path) -> None:
    launch("toy.py", tmp_path / "two", "training__epochs=1", "training__zero_stage=2", processes=2)
    for run in ("two", "one"):
        recipe = toy.recipe(training__epochs=3, training__zero_stage=2)
        train(recipe, toy.ToyTask(), run_dir=tmp_path / run, progress=False)
    two, one = (load_file(tmp_path / run / "weights.safetensors") for run in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
