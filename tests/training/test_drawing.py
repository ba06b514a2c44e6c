"""Pictures at the end of a run are drawn by whoever asked for it; training itself knows none."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from smoe_hpc.training import train

from . import toy


def test_what_draws_gets_the_folder_and_the_best_model_of_a_run_that_has_just_ended(tmp_path: Path) -> None:
    drawn: list[tuple[Path, bool]] = []

    def draw(run_dir: Path, model: nn.Module) -> None:
        drawn.append((run_dir, (run_dir / "weights.safetensors").exists()))

    recipe = toy.recipe(training__max_steps=8)
    scores = train(recipe, toy.ToyTask(), run_dir=tmp_path, progress=False, draw=draw)
    assert drawn == [(tmp_path, True)]
    assert train(recipe, toy.ToyTask(), run_dir=tmp_path, progress=False, draw=draw) == scores
    assert len(drawn) == 1, "what has ended is not drawn again"


def test_a_picture_that_fails_fails_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def draw(run_dir: Path, model: nn.Module) -> None:
        raise ImportError("no font")

    recipe = toy.recipe(training__max_steps=8)
    scores = train(recipe, toy.ToyTask(), run_dir=tmp_path, progress=False, draw=draw)
    assert set(scores) == {"validation", "test"}
    assert f"pictures of {tmp_path} were not drawn (ImportError: no font)" in caplog.text


def test_no_pictures_where_the_recipe_wants_none(tmp_path: Path) -> None:
    recipe = toy.recipe(training__max_steps=8, run__pictures=False)
    train(recipe, toy.ToyTask(), run_dir=tmp_path, progress=False, draw=toy.draw)
    assert not (tmp_path / "drawn").exists()
