"""Every key is explained, and the page of the reference says what the code says."""

from pathlib import Path

import pytest

from smoe_hpc.config import load_recipe, recipe_names
from smoe_hpc.config.keys import all_keys, members
from smoe_hpc.config.reference import explained, lines, page
from smoe_hpc.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
NUMBERS = [name for name, key in all_keys().items() if {int, float} & set(members(key.hint))]
BOUNDS = ("at least 1", "not negative", "above 0", "from 0 to", "odd")


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m smoe_hpc.config.reference > docs/recipes.md"


@pytest.mark.parametrize("name", all_keys())
def test_every_key_has_a_meaning_in_one_line(name: str):
    key = all_keys()[name]
    assert len(key.meaning) > 8
    assert "\n" not in key.meaning
    assert ":class:" not in key.meaning
    for choice in key.choices:  # each of a few words is explained, unless it says all itself
        named = str(choice) in key.meaning
        assert named or name in ("model.activation", "training.zero_stage", "model.gate.noise"), (name, choice)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_names_its_bound(name: str):
    """A number that a recipe refuses to be -1 says what it may be."""
    try:
        load_recipe("weather_smoe_1p4deg", [f"{name}=-1"])
    except ConfigError:
        assert any(bound in all_keys()[name].meaning for bound in BOUNDS), name
    else:
        assert name == "training.stop_at_score"


def test_what_a_recipe_says_of_each_key():
    found = explained(load_recipe("heat_smoe", ["optimizer.lr=0.001234567"]))
    assert set(found) == {name for name, key in all_keys().items() if key.section is None}
    assert found["model.routing_loss.quantile"] == {
        "value": 0.3,
        "default": "balanced",
        "allowed": "balanced or a number",
        "meaning": all_keys()["model.routing_loss.quantile"].meaning.removesuffix("."),
    }
    assert "default" not in found["data.store"]
    assert found["data.leads"]["allowed"] == "a list, each a whole number, or null"
    shown = list(lines(load_recipe("heat_smoe", ["optimizer.lr=0.001234567"]), 100))
    assert "  optimizer.lr=0.001234567  (default 0.001; a number)" in shown


def test_a_section_that_is_null_has_no_values():
    recipe = load_recipe("heat_conv2", ["model.damping=null"])
    assert "value" not in explained(recipe)["model.damping.factor"]
    shown = list(lines(recipe, 100))
    assert any(line.startswith("model.damping=null: how much of the gradient") for line in shown)
    assert "  model.damping.factor  (default 0.05; a number)" in shown


@pytest.mark.parametrize("name", recipe_names())
def test_lines_fit_the_terminal(name: str):
    long = [line for line in lines(load_recipe(name), 90) if len(line) > 90]
    assert all(line.lstrip().startswith("data.variables=[") for line in long), "what is to be copied stays whole"
