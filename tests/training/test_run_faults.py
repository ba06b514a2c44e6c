"""Runs whose folders were damaged, emptied or taken away: they say so, go on where they can, and destroy nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smoe_hpc.errors import CheckpointError, RunError
from smoe_hpc.training import loop, train
from smoe_hpc.training.checkpoint import Checkpoints
from smoe_hpc.training.processes import Processes

from . import toy
from .toy_runs import run_for, same

# -- the first checkpoint, and where a run goes on ------------------------------------------------------------------------


def test_the_first_checkpoint_does_not_wait_for_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rare = {"run__checkpoint_every": 1000, "training__validate_every": 1000}
    run_for(tmp_path / "late", 3, **rare)
    assert [path.name for path in (tmp_path / "late" / "checkpoints").iterdir()] == ["step_3"]  # the end
    monkeypatch.setattr(loop, "FIRST_CHECKPOINT", 0.0)
    saved = []

    class Looking(toy.ToyTask):
        def loss(self, output, batch):  # type: ignore[no-untyped-def]
            saved.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()))
            return super().loss(output, batch)

    train(toy.recipe(training__max_steps=4, **rare), Looking(), run_dir=tmp_path / "run", progress=False)
    assert saved == [[], ["step_1"], ["step_1"], ["step_1"]]  # after that one, as the recipe says


class Dies(toy.ToyTask):
    """Fails after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def loss(self, output, batch):  # type: ignore[no-untyped-def]
        if self._calls == self.steps:
            raise OSError("gone")
        return super().loss(output, batch)


def first_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[0]


def test_the_first_line_says_where_a_run_begins_and_why(stopped: Path, tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    train(toy.recipe(training__max_steps=13), toy.ToyTask(), run_dir=stopped)
    assert "goes on from step 12, epoch 1 (step_12)" in first_line(capsys)
    monkeypatch.setattr(loop, "READ_BACK", 1)
    with pytest.raises(OSError, match="gone"):
        train(toy.recipe(), Dies(2), run_dir=tmp_path / "new")
    assert "starts at step 0: a new run" in first_line(capsys)
    assert len(toy.read_lines(tmp_path / "new" / "metrics.jsonl")) == 2
    train(toy.recipe(training__max_steps=4), toy.ToyTask(), run_dir=tmp_path / "new")
    assert "starts anew at step 0: it was stopped before its first checkpoint" in first_line(capsys)


def test_lines_are_kept_aside_until_something_replaces_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "READ_BACK", 1)
    for steps in (3, 1):
        with pytest.raises(OSError, match="gone"):
            train(toy.recipe(), Dies(steps), run_dir=tmp_path, progress=False)
        assert not list((tmp_path / "checkpoints").iterdir())
    cut = toy.read_lines(tmp_path / "metrics.jsonl.cut")
    assert [line["step"] for line in cut] == [1, 2, 3]
    run_for(tmp_path, 8)
    assert not list(tmp_path.glob("*.cut"))


# -- checkpoints that cannot be reached -----------------------------------------------------------------------------------


def lost_mount(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()


def is_a_file(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.touch()


def is_a_loop(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to(checkpoints.name)


@pytest.mark.parametrize("fault", [lost_mount, is_a_file, is_a_loop, shutil.rmtree])
def test_checkpoints_that_cannot_be_reached_destroy_no_run(stopped: Path, whole: Path, fault: Callable[[Path], None]) -> None:
    kept = stopped.parent / "kept"
    shutil.copytree(stopped / "checkpoints", kept)
    metrics = (stopped / "metrics.jsonl").read_bytes()
    fault(stopped / "checkpoints")
    with pytest.raises((CheckpointError, RunError), match=r"mount|put that folder back"):
        run_for(stopped, 16)
    assert (stopped / "metrics.jsonl").read_bytes() == metrics
    checkpoints = stopped / "checkpoints"
    shutil.rmtree(checkpoints) if checkpoints.is_dir() else checkpoints.unlink(missing_ok=True)
    shutil.copytree(kept, checkpoints)
    run_for(stopped, 16)
    same(stopped, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_checkpoints_without_rights_are_no_empty_folder(stopped: Path) -> None:
    end, start = os.pipe()
    if os.fork() == 0:
        os.setuid(65534)
        try:
            said = str(Checkpoints(stopped / "checkpoints", Processes(0, 1, torch.device("cpu"), None), 2).newest())
        except CheckpointError as error:
            said = str(error)
        os.write(start, said.encode())
        os._exit(0)
    os.wait()
    assert "cannot be read (Permission denied): mount it or give its rights back" in os.read(end, 4096).decode()


def test_removed_checkpoints_of_an_earlier_version_ask(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints.json").unlink()
    with pytest.raises(RunError, match=r"has metrics of a run but no checkpoints/: put that folder back; .*remove"):
        run_for(stopped, 16)
    (stopped / "metrics.jsonl").unlink()
    run_for(stopped, 16)


def test_a_recipe_that_is_gone_is_not_replaced_by_another(stopped: Path) -> None:
    (stopped / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"holds a run whose config.yaml is gone: put it back"):
        run_for(stopped, 16, optimizer__lr=1.0)


def test_folders_that_are_no_checkpoints_are_passed_over(stopped: Path, whole: Path) -> None:
    for name in ("step_x", "step_", "step_007", "step_99", "steps"):
        (stopped / "checkpoints" / name).mkdir()
    (stopped / "checkpoints" / "step_98").touch()
    run_for(stopped, 16)
    same(stopped, whole)
