from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch

from smoe_hpc.config import Damping, Gate, RoutingLoss, load_recipe, recipe_names, recipe_summary, to_yaml
from smoe_hpc.config.keys import all_keys
from smoe_hpc.config.reading import RECIPES
from smoe_hpc.io.channels import CONSTANTS, channels_of
from smoe_hpc.layers import begin_step, spatial_layers
from smoe_hpc.models import build_model
from smoe_hpc.runs.identity import differences, identity_of

PLAIN = (int, float, str, bool, type(None))
EQUAL_BUDGET = ("uk_t2m_conv", "uk_t2m_lcn", "uk_t2m_low_rank_lcn", "uk_t2m_smoe")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_one_file_that_says_what_it_is(name: str, recwarn: pytest.WarningsRecorder):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe_summary(name)) > 20
    assert (RECIPES / f"{name}.yaml").read_text().splitlines()[1].startswith("# ")  # its source
    assert not recwarn.list, "a recipe that comes with the package stays in the working range"


@pytest.mark.parametrize("name", recipe_names())
def test_yaml_round_trips(name: str, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_round_trip_keeps_what_yaml_likes_to_change(tmp_path):
    overrides = ["name=1e3", "data.splits.train=10:20", "optimizer.lr=1e-7", "data.store=null and void"]
    recipe = load_recipe("heat_smoe", [*overrides, "model.damping=null", "training.max_steps=null"])
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert (recipe.name, recipe.data.splits.train, recipe.optimizer.lr) == ("1e3", "10:20", 1e-7)
    assert recipe.data.store == "null and void"


def test_round_trip_of_names_that_look_like_values(tmp_path):
    recipe = load_recipe("uk_t2m_conv", ["data.variables=['on', '1e-3', 'null', '10:20']"])
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml").data.variables == ["on", "1e-3", "null", "10:20"]


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(plain(item) for item in value.values())
    if type(value) is list:
        return all(plain(item) for item in value)
    return type(value) in PLAIN


def test_a_recipe_is_frozen_and_plain():
    recipe = load_recipe("uk_t2m_smoe")
    with pytest.raises(FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]
    assert plain(asdict(recipe))


def test_a_changed_copy_is_checked_too():
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        replace(load_recipe("heat_smoe").optimizer, lr=-1.0)


def test_the_published_heat_run():
    recipe = load_recipe("heat_smoe")
    assert (recipe.model.num_experts, recipe.model.selected, recipe.model.weighted) == (3, [1], False)
    assert recipe.model.gate == Gate(kind="latent")
    assert recipe.model.routing_loss == RoutingLoss(quantile=0.3)
    assert recipe.model.damping == Damping()
    assert recipe.model.damping.factor == 0.05  # not the published 0: docs/heat.md
    assert not recipe.model.bias
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.gate_lr) == ("adam", 1e-3, None)
    assert (recipe.training.batch, recipe.training.epochs, recipe.training.precision) == (32, 150, "float32")
    assert (recipe.schedule.factor, recipe.schedule.patience, recipe.schedule.early_stop) == (0.1, 15, 30)


def test_the_real_file_is_split_as_said_and_budgets_are_equal():
    recipes = [load_recipe(name) for name in EQUAL_BUDGET]
    for recipe in recipes:
        assert recipe.data == recipes[0].data
        assert recipe.training == recipes[0].training
        assert recipe.schedule == recipes[0].schedule
        assert (recipe.model.channels, recipe.model.residual) == (recipes[0].model.channels, True)
    data = recipes[0].data
    assert (data.inputs, data.lead, data.normalize) == ([-12, -6, 0], 6, True)
    assert [data.splits[split] for split in ("train", "validation", "test")] == [
        "2019-03-01/2019-03-23",
        "2019-03-24/2019-03-26",
        "2019-03-27/2019-03-31",
    ]


def test_the_quickstart_gives_both_models_the_same_data_and_batches():
    ours, theirs = load_recipe("heat_quickstart"), load_recipe("quickstart_conv")
    assert replace(ours.training, max_steps=theirs.training.max_steps) == theirs.training
    assert ours.data == theirs.data


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds(name: str):
    recipe = load_recipe(name)
    frames, height, width = len(recipe.data.inputs), 6, 5
    outputs = len(recipe.data.targets or [1]) if recipe.model.network == "resnet" else recipe.model.channels[-1]
    regions = torch.arange(height * width).reshape(height, width) % 3
    model = build_model(recipe, frames, outputs, (height, width), regions)
    for layer in spatial_layers(model):
        if layer.routing_loss is not None and layer.routing_loss.error_scale == "loss_weight":
            layer.set_loss_weight(torch.ones(height, width))
    begin_step(model, 0)
    batch = recipe.model.ghost_batch if recipe.model.normalises else 2
    output = model(torch.ones(batch, frames, height, width))
    assert output.shape == (batch, outputs, height, width)


WEATHER = [name for name in recipe_names() if name.startswith("weather_")]


@pytest.mark.parametrize("name", WEATHER)
def test_weather_recipes_are_as_published(name: str):
    recipe = load_recipe(name)
    data, model, smoe = recipe.data, recipe.model, recipe.model.kind == "smoe"
    assert data.variables is not None
    assert data.variables == [channel.name for channel in channels_of("rt38")]
    assert set(data.constants) == set(CONSTANTS)
    assert len(data.inputs) * len(data.variables) + len(data.constants) == 117
    assert (data.inputs, data.leads, data.targets) == ([-12, -6, 0], [72], ["z500", "t850", "t2m"])
    assert [data.splits[split][:4] for split in ("train", "validation", "test")] == ["1979", "2016", "2017"]
    assert (data.gaps, data.order, recipe.loader.backend, recipe.training.precision) == ("refuse", "blocks", "auto", "bf16")
    assert (model.network, model.width, model.blocks, model.dropout) == ("resnet", 128, 19, 0.1)
    assert (model.stem_kernel, model.kernel_size, model.padding) == (7, 3, "periodic_longitude")
    schedule = recipe.schedule
    assert recipe.training.batch == (64 if smoe else 32)
    assert recipe.optimizer.lr == (1e-3 if smoe else 5e-5)
    assert recipe.optimizer.weight_decay == 2e-5
    assert (schedule.factor, schedule.patience, schedule.early_stop) == (0.1 if smoe else 0.2, 2, 5)
    assert (schedule.min_lr, schedule.min_delta) == ((1e-6, 0.0) if smoe else (0.0, 1e-4))
    if smoe:
        assert set(model.selected) == {128}
        assert (model.expert_order, model.gate.share, model.num_experts) == ("id", True, 256)
    assert ("1p4deg" in name) == (data.store == "data/era5_1p4deg")


def test_weather_recipes_of_two_grids_differ_in_what_the_grid_asks_for():
    for kind in ("resnet", "smoe"):
        fine, coarse = (load_recipe(f"weather_{kind}_{grid}") for grid in ("1p4deg", "5p625deg"))
        alike = replace(fine, name=coarse.name, data=replace(fine.data, store=coarse.data.store))
        alike = replace(alike, model=replace(fine.model, ghost_batch=coarse.model.ghost_batch))
        assert replace(alike, training=replace(fine.training, zero_stage=0)) == coarse


def test_the_loader_is_no_part_of_a_runs_identity():
    plain = load_recipe("weather_smoe_1p4deg", ["loader.backend=threads", "loader.verify=all"])
    dali = load_recipe("weather_smoe_1p4deg", ["loader.backend=dali", "loader.workers=7"])
    assert identity_of(plain) == identity_of(dali)
    assert not differences(plain, dali)
    other = load_recipe("weather_smoe_1p4deg", ["model.ghost_batch=4"])
    assert identity_of(plain) != identity_of(other)


def test_every_field_is_described():
    for key, entry in all_keys().items():
        section, _, last = key.rpartition(".")
        owner = all_keys()[section].section if section else load_recipe("heat_smoe").__class__
        assert owner is not None
        assert last in (owner.__doc__ or ""), f"{key} is not in the docstring of {owner.__name__}"
        assert entry.name == key
