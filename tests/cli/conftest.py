"""One process in an empty folder, whatever started the tests."""

from pathlib import Path

import pytest

from tests.cli.calling import SCORES, replace_room


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Calls of a training that takes no time."""
    calls: list[dict[str, object]] = []

    def train(recipe, task, *, run_dir, resume):  # type: ignore[no-untyped-def]
        calls.append({"recipe": recipe, "task": task, "run_dir": run_dir, "resume": resume})
        return SCORES

    replace_room(monkeypatch, "smoe_hpc.jobs.queue", train_or_requeue=train)
    replace_room(monkeypatch, "smoe_hpc.tasks", make_task=lambda recipe: f"task of {recipe.name}")
    return calls
