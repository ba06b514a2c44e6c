import warnings

import pytest

from smoe_hpc.config import load_recipe
from smoe_hpc.config.working_range import HIGHEST, LOWEST, out_of_range


def warnings_of(recipe: str, *overrides: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_recipe(recipe, overrides)
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("heat_smoe", []),  # 0.3 at 1/3, as published
        ("heat_smoe", ["model.routing_loss.quantile=balanced"]),
        ("heat_smoe", ["model.routing_loss.quantile=0.4"]),
        ("heat_smoe", ["model.weighted=true", "model.routing_loss=null", "model.damping=null"]),
        ("heat_smoe", ["model={channels: [3], routing_loss: {quantile: 0.9}}"]),  # K = N: no routing loss
        ("heat_conv2", []),  # no gate
        ("heat_smoe_oracle", ["model.routing_loss.quantile=0.9"]),  # nothing to learn
        ("uk_t2m_smoe", ["model.routing_loss.quantile=0.5"]),
    ],
)
def test_silent_inside(recipe: str, overrides: list[str]):
    assert warnings_of(recipe, *overrides) == []


@pytest.mark.parametrize(
    ("recipe", "overrides", "what"),
    [
        ("heat_smoe", ["model.routing_loss.quantile=0.2"], "replaced for ever"),
        ("heat_smoe", ["model.routing_loss.quantile=0.7"], "freezes"),
        ("heat_smoe", ["model.num_experts=2"], "replaced for ever"),  # 0.3 is published for 1/3 alone
        ("heat_noisy", ["model.routing_loss.quantile=0.3"], "replaced for ever"),  # and for noiseless targets
        ("uk_t2m_smoe", ["model.routing_loss.quantile=0.3"], "replaced for ever"),
    ],
)
def test_one_warning_outside(recipe: str, overrides: list[str], what: str):
    (message,) = warnings_of(recipe, *overrides)
    assert what in message
    assert "model.routing_loss.quantile=balanced" in message


def test_one_warning_however_many_layers():
    (message,) = warnings_of("heat_smoe", "model={channels: [1, 2, 1], routing_loss: {quantile: 0.9}}")
    assert "layer 0, which selects 1 of 3 experts" in message


@pytest.mark.parametrize(("experts", "selected"), [(2, 1), (3, 1), (4, 1), (16, 8), (64, 48)])
def test_the_range_holds_its_ends(experts: int, selected: int):
    share = selected / experts
    assert out_of_range(LOWEST * share, experts, selected) is None
    assert out_of_range(HIGHEST * share, experts, selected) is None
    assert out_of_range(0.99 * LOWEST * share, experts, selected)
    assert out_of_range(1.01 * HIGHEST * share, experts, selected)
