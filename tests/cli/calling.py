"""The command called as a user calls it, in this process."""

import sys
import types
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from smoe_hpc.cli import app

SMALL_HEAT = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]
SCORES = {"test": {"all": {"within_1pct": 99.5}, "region_0": {"within_1pct": 100.0}}}


def command(*arguments: str) -> Result:
    """What `smoe-hpc` with these arguments does."""
    return CliRunner().invoke(app, arguments, prog_name="smoe-hpc")


def replace_room(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., object]) -> None:
    """Put a module with these functions in the place of a room."""
    room = types.ModuleType(name)
    for key, function in functions.items():
        setattr(room, key, function)
    monkeypatch.setitem(sys.modules, name, room)
