"""train --dry-run, with the data at hand and without."""

import json
from pathlib import Path

import pytest

from tests.cli.calling import SMALL_HEAT, command


def test_dry_run(tmp_path: Path):
    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    result = command("train", "heat_smoe", "--dry-run", "training.batch=8", "--json", "plan.json")
    assert result.exit_code == 0, result.output
    assert "quantile: 0.3" in result.stdout, "the resolved recipe"
    plan = json.loads((tmp_path / "plan.json").read_text())
    # 4 / 2 / 2 runs of 11 states make 10 pairs each; 27 expert weights and 3 x 12 x 12 gate values
    assert plan == {
        "parameters": 27 + 3 * 144,
        "samples": {"train": 40, "validation": 20, "test": 20},
        "steps_per_epoch": 5,
        "world": 1,
    }
    assert not (tmp_path / "runs").exists()
    too_many = command("train", "heat_smoe", "--dry-run", "training.batch=64")
    assert too_many.exit_code == 2
    assert "training.batch=64: the training split holds only 40 samples" in too_many.stderr


def lines_of(output: str) -> dict[str, str]:
    """What follows the recipe, by its name."""
    return {line[:18].strip(): line[19:] for line in output.rpartition("\n\n")[2].splitlines()}


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("heat_smoe", "27 and 3 for each grid point"),
        ("heat_conv2", "77"),
        ("heat_lcn", "0 and 10 for each grid point"),
        ("heat_low_rank_lcn", "need the data"),  # they grow with rows + columns
        ("heat_smoe_linear_gate", "need the data"),  # with the square of the points
        ("uk_t2m_conv", "need the data"),  # the store says how many channels there are
        ("weather_resnet_5p625deg", "6,355,587"),
        ("weather_smoe_5p625deg", "11,958,915 and 256 for each grid point"),
    ],
)
def test_without_data(recipe: str, parameters: str):
    groups = ["model.ghost_batch=8"] if recipe.startswith("weather") else []
    result = command("train", recipe, "--dry-run", "training.accumulation=2", *groups)
    assert result.exit_code == 0, result.output
    assert f"name: {recipe}\n" in result.stdout
    told = lines_of(result.stdout)
    assert told["parameters"] == parameters
    assert (told["samples"], told["steps per epoch"]) == ("need the data", "need the data")
    assert told["each process"] in ("2 x 16 samples a step", "2 x 32 samples a step")
    assert told["data"].startswith("no data at ")
    assert "make some: `smoe-hpc" in told["data"]


def test_the_parameters_are_those_with_data():
    """What is said without data, on the grid of the data, is what is said with them."""
    without = command("train", "heat_smoe", "--dry-run", "--json", "-")
    told = json.loads(without.stdout)
    assert (told["parameters"], told["samples"], told["world"]) == (None, None, 1)
    assert command("data", "heat", "data/heat", *SMALL_HEAT).exit_code == 0
    with_data = json.loads(command("train", "heat_smoe", "training.batch=8", "--dry-run", "--json", "-").stdout)
    assert with_data["parameters"] == told["parameters_fixed"] + 12 * 12 * told["parameters_per_grid_point"]


def test_every_process_has_its_share(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert lines_of(command("train", "heat_smoe", "--dry-run").stdout)["each process"] == "1 x 8 samples a step"


def test_data_that_are_there_and_wrong_are_an_error():
    Path("data/heat").mkdir(parents=True)
    result = command("train", "heat_smoe", "--dry-run")
    assert result.exit_code == 2
    assert "heat_train.h5" in result.stderr
