"""The room of runs: no torch in it, and one place for the path of a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from smoe_hpc.config import load_recipe
from smoe_hpc.runs import layout
from smoe_hpc.runs.directory import RunDirectory


def test_the_room_brings_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, smoe_hpc.runs\n"
        "for module in sorted(pkgutil.iter_modules(smoe_hpc.runs.__path__), key=lambda one: one.name == 'description'):\n"
        "    importlib.import_module(f'smoe_hpc.runs.{module.name}')\n"
        "    if module.name != 'description':  # which has a grid, and is read by those who forecast\n"
        "        assert not {'numpy', 'h5py'} & set(sys.modules), module.name\n"
        "print(sorted({'torch', 'deepspeed', 'matplotlib'} & set(sys.modules)))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_where_the_run_of_a_recipe_lies(tmp_path: Path) -> None:
    recipe = load_recipe("heat_smoe", [f"run.root={tmp_path}"])
    run = RunDirectory.of(replace(recipe, name="second"))
    assert run.path == tmp_path / "second"
    assert (run.weights, run.jobs) == (run.path / layout.WEIGHTS, run.path / layout.JOBS)
