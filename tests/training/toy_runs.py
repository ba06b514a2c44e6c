"""A run of the toy that ended, one that was stopped, and what must be the same of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoe_hpc.training import train

from . import toy


def run_for(path: Path, steps: int, **changes: object) -> None:
    train(toy.recipe(training__max_steps=steps, **changes), toy.ToyTask(), run_dir=path, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run_for(path, 16)
    return path


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that stands at step 12, as if it had been killed there."""
    run_for(tmp_path / "run", 12)
    (tmp_path / "run" / "finished.json").unlink()
    return tmp_path / "run"


def same(run: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "scores.json", "weights.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
