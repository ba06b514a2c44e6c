"""``import smoe_hpc``: cheap, typed, and every name is what the room has."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smoe_hpc

SMALL = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]


def test_importing_is_cheap_and_brings_no_torch():
    code = "import smoe_hpc, sys; assert 'SpatialMoE2d' in dir(smoe_hpc); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", smoe_hpc.__all__)
def test_every_name_is_there_and_documented(name: str):
    found = getattr(smoe_hpc, name)
    assert name == "__version__" or found.__doc__
    assert name in dir(smoe_hpc)


def test_names_are_the_rooms_own():
    for name, room in smoe_hpc._ROOMS.items():
        assert getattr(smoe_hpc, name) is getattr(importlib.import_module(f"smoe_hpc.{room}"), name)
    assert set(smoe_hpc._ROOMS) == set(smoe_hpc.__all__) - {"__version__"}
    from smoe_hpc.launch import submit

    assert submit is smoe_hpc.submit
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = smoe_hpc.nothing
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module("smoe_hpc.launch").nothing  # noqa: B018


def test_an_experiment_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from smoe_hpc.io.synthetic.heat import make_heat

    monkeypatch.chdir(tmp_path)
    make_heat("data/heat", (4, 2, 2), (12, 12), 10)
    overrides = {"training.batch": 8, "training.max_steps": 2, "run.pictures": False}
    scores = smoe_hpc.train("heat_conv1", overrides, run_name="mine", progress=False)
    assert not {"MASTER_PORT", "RANK", "WORLD_SIZE"} & set(os.environ)  # processes started later are not misled
    assert smoe_hpc.evaluate("runs/mine") == scores["test"]
    assert smoe_hpc.evaluate("runs/mine", "validation") == scores["validation"]
    assert smoe_hpc.load_run("runs/mine").description.step == 2
    forecast = smoe_hpc.load_run("runs/mine").forecast(smoe_hpc.open_store("data/heat/heat_test.h5"), (6, 0))
    assert forecast["heat"].shape == (1, 1, 12, 12)
