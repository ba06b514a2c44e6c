"""The verbs of data: what they write, show and refuse."""

import json
from pathlib import Path

import pytest

from tests.cli.calling import SMALL_HEAT, command


def test_data_heat_and_inspect(tmp_path: Path):
    made = command("data", "heat", "data/heat", *SMALL_HEAT)
    assert made.exit_code == 0, made.output
    assert "data/heat/heat_test.h5" in made.stdout
    other = command("data", "heat", "data/heat", *SMALL_HEAT, "--seed", "1")
    assert other.exit_code == 2, "other data are not silently replaced"
    assert command("data", "heat", "data/heat", *SMALL_HEAT, "--seed", "1", "--overwrite").exit_code == 0
    shown = command("data", "inspect", "data/heat/heat_train.h5", "--json", "store.json")
    assert shown.exit_code == 0
    assert "constants: region, diffusivity" in shown.stdout
    assert json.loads((tmp_path / "store.json").read_text())["samples"]["count"] == 44


@pytest.mark.parametrize("option", ["--noise", "--noise-ratio"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_noise_that_is_no_number(option: str, value: str, tmp_path: Path):
    result = command("data", "heat", "data/heat", *SMALL_HEAT, "--noise", "1", option, value)
    assert result.exit_code == 2
    assert "both of them finite" in result.stderr
    assert not (tmp_path / "data").exists()
