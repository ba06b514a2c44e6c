"""Recipes that were written before a key got its present name are read, with a warning, as the recipe that they were."""

import warnings
from pathlib import Path

import pytest

from smoe_hpc.config import Recipe, load_recipe, to_yaml
from smoe_hpc.config.keys import all_keys
from smoe_hpc.config.renamed import KEYS, VALUES
from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.runs.directory import RunDirectory


def loaded(name: str | Path, *overrides: str) -> tuple[Recipe, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = load_recipe(name, overrides)
    assert all(warning.category is UserWarning for warning in caught)
    return recipe, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("override", "present"),
    [
        ("loader.front=dali", "loader.backend=dali"),
        ("loader.front=plain", "loader.backend=threads"),
        ("loader.backend=plain", "loader.backend=threads"),
        ("loader={front: plain, workers: 3}", "loader={backend: threads, workers: 3}"),
    ],
)
def test_an_override(override: str, present: str) -> None:
    recipe, told = loaded("weather_smoe_1p4deg", override)
    assert recipe == load_recipe("weather_smoe_1p4deg", [present])
    (message,) = told
    written = f"loader.backend={recipe.loader.backend}"
    assert message.endswith(f"has another name now; write {written}")


def test_a_run_of_before_goes_on(tmp_path: Path) -> None:
    """Its config.yaml has every key, two of them under other names."""
    recipe = load_recipe("weather_smoe_1p4deg", ["loader.backend=threads", "loader.workers=3"])
    written = to_yaml(recipe).replace("backend: threads", "front: plain")
    assert "front: plain" in written
    (tmp_path / "config.yaml").write_text(written)
    again, told = loaded(tmp_path / "config.yaml")
    assert again == recipe
    assert told == ["loader.front=plain has another name now; write loader.backend=threads"]
    run = RunDirectory(tmp_path)
    with pytest.warns(UserWarning, match=r"write loader\.backend=threads"):
        run.check(recipe, resume=True)
    with (
        pytest.warns(UserWarning, match=r"write loader\.backend=threads"),
        pytest.raises(RunError, match=r"belongs to another recipe: training\.seed=5 \(there: 0\)"),
    ):
        run.check(load_recipe("weather_smoe_1p4deg", ["training.seed=5"]), resume=True)


def test_a_users_recipe_and_the_last_assignment_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntask: heat\ndata: {store: data/heat}\nloader: {front: dali}\n")
    assert loaded(path)[0].loader.backend == "dali"
    assert loaded(path, "loader.backend=threads")[0].loader.backend == "threads"


def test_no_warning_of_present_names() -> None:
    assert loaded("heat_smoe", "loader.backend=threads")[1] == []


def test_other_values_are_refused_under_the_present_name() -> None:
    with (
        pytest.warns(UserWarning, match=r"write loader\.backend=dalli"),
        pytest.raises(ConfigError, match=r"loader.backend='dalli': expected one of .*; did you mean dali\?"),
    ):
        load_recipe("heat_smoe", ["loader.front=dalli"])


def test_the_table_leads_to_keys_and_values_of_today() -> None:
    keys = all_keys()
    assert set(KEYS.values()) <= set(keys)
    assert not set(KEYS) & set(keys)
    for name, values in VALUES.items():
        assert set(values.values()) <= set(keys[name].choices)
        assert not set(values) & set(keys[name].choices)
