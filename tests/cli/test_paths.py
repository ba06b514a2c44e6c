"""Every path that the command takes: where ~ is, and that nothing of a name is lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from typer.testing import CliRunner, Result

from smoe_hpc.cli import app
from smoe_hpc.cli.paths import user_path
from smoe_hpc.io.statistics.cache import cache_file
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.kernels.build.places import cpu_place

SMALL_HEAT = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder beside the one that commands are given in."""
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="smoe-hpc")


def paths(group: typer.Typer, name: str = "") -> Iterator[tuple[str, object]]:
    """Every path that a verb takes, and what parses it."""
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from paths(inner.typer_instance, f"{name} {inner.name}")
    for verb in group.registered_commands:
        assert verb.callback is not None
        for parameter, hint in get_type_hints(verb.callback, include_extras=True).items():
            if "Path" in str(hint):
                yield f"{name} {verb.callback.__name__} {parameter}", getattr(hint.__metadata__[0], "parser", None)


def test_every_path_of_the_command_knows_the_home_folder() -> None:
    found = dict(paths(app))
    assert {" data convert source", " status root", " train json_file", " report runs"} <= set(found)
    assert [name for name, parser in found.items() if parser is not user_path] == []


def test_no_folder_is_called_tilde(home: Path) -> None:
    """From data to a run's state, each path in the form that no shell has touched."""
    assert command("data", "heat", "~/heat #1", *SMALL_HEAT).exit_code == 0
    assert (home / "heat #1" / "heat_train.h5").exists()
    assert command("data", "inspect", "~/heat #1/heat_train.h5", "--json=~/inspected.json").exit_code == 0
    assert json.loads((home / "inspected.json").read_text())["path"] == str(home / "heat #1" / "heat_train.h5")
    short = ["training.batch=8", "training.max_steps=2", "training.validate_every=2", "run.pictures=false"]
    trained = command("train", "heat_quickstart", "data.store=~/heat #1", "run.root=~/runs #1", *short)
    assert trained.exit_code == 0, trained.output
    run = home / "runs #1" / "heat_quickstart"
    assert (run / "scores.json").exists()
    assert command("evaluate", "~/runs #1/heat_quickstart").exit_code == 0
    assert "heat_quickstart" in command("status", "~/runs #1").stdout
    submitted = command(
        "submit", "heat_quickstart", "data.store=~/heat #1", "run.root=~/more", *short, "--cluster", "local", "--wait"
    )
    assert submitted.exit_code == 0, submitted.output
    assert (home / "more" / "heat_quickstart" / "scores.json").exists()
    assert list(Path().iterdir()) == []


def test_caches_know_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOE_CACHE", "~/cache #1")
    assert cpu_place().folder.parent == home / "cache #1" / "kernels"
    assert command("data", "heat", "heat", *SMALL_HEAT).exit_code == 0
    monkeypatch.setattr("smoe_hpc.io.statistics.cache._can_write", lambda folder: False)
    kept = cache_file(open_store("heat/heat_train.h5"), "statistics", ("all",), ".json")
    assert kept.parent == home / "cache #1" / "statistics"


def test_no_such_home_is_an_error_of_usage() -> None:
    result = command("data", "inspect", "~no_such_user/x.h5")
    assert result.exit_code == 2
    assert "there is no home folder of '~no_such_user'; write the path" in " ".join(result.stderr.replace("│", " ").split())
