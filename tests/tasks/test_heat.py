"""The heat experiment as a task: samples, loss, scores, model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smoe_hpc.config import Data, Gate, Model, Recipe, Training
from smoe_hpc.errors import ConfigError, DataError
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.synthetic.heat import make_heat
from smoe_hpc.layers import begin_step, end_step, parameter_groups, routing_loss
from smoe_hpc.tasks import HeatTask, make_task
from smoe_hpc.tasks.heat import routed_by_region, routing_of

GRID = (8, 10)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heat")
    make_heat(path, runs=(6, 2, 2), grid=GRID, steps=20)
    return path


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("noisy")
    make_heat(path, runs=(3, 2, 2), grid=GRID, steps=10, noise=0.5, noise_ratio=4.0)
    return path


def recipe(store: Path, **data) -> Recipe:
    return Recipe(name="t", task="heat", data=Data(store=str(store), **data), model=Model(bias=False))


def scores(task, model, split="test") -> dict:
    board = task.score(split)
    with torch.no_grad():
        for batch in Loader(task.samples(split)).evaluate(7):
            board.update(model(batch.inputs), batch, batch.valid)
    return board.result()


def perfect(task) -> torch.nn.Module:
    """The true stencils, in the order of a renamed routing."""
    model = task.build_model()
    (layer,) = model.layers
    diffusivities = task.samples("train").store.constants["diffusivity"]
    region = task.region_map()
    with torch.no_grad():
        for r in range(3):
            d = diffusivities[region.numpy() == r][0]
            stencil = torch.tensor([[0, d, 0], [d, 1 - 4 * d, d], [0, d, 0]])
            layer.weight[(r + 1) % 3] = stencil
            layer.gate.logits[(r + 1) % 3] = (region == r).float()
    return model


def test_the_true_stencils_score_perfectly(clean: Path):
    task = make_task(recipe(clean))
    assert isinstance(task, HeatTask)
    result = scores(task, perfect(task))
    assert set(result) == {"all", "region_0", "region_1", "region_2"}
    assert all(region["within_1pct"] == 100 for region in result.values())
    assert result["all"]["rmse"] < 1e-6
    assert result["all"]["routing_agreement"] == 100
    assert result["all"]["load_entropy"] > 0.5
    assert task.selection.score == "within_1pct"
    assert task.selection.mode == "max"


def test_scores_say_what_the_loss_says(clean: Path):
    task = make_task(recipe(clean))
    model = task.build_model()
    samples = task.samples("validation")
    batch = samples.fetch(range(len(samples)))
    with torch.no_grad():
        loss = float(task.loss(model(batch.inputs), batch))
    result = scores(task, model, "validation")
    assert result["all"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["all"]["rmse"] == pytest.approx(loss**0.5, rel=1e-5)
    cells = np.bincount(task.region_map().numpy().ravel())
    parts = [result[f"region_{r}"]["loss"] for r in range(3)]
    assert np.dot(cells, parts) / cells.sum() == pytest.approx(result["all"]["loss"], rel=1e-9)


def test_a_few_steps_of_training(clean: Path):
    # The whole path as the training loop walks it, on a trial so small that it takes a second.
    task = make_task(recipe(clean))
    model = task.build_model()
    samples = task.samples("train")
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    before = scores(task, model)
    rng = np.random.default_rng(0)
    for step in range(300):
        batch = samples.fetch(rng.integers(0, len(samples), 16))
        begin_step(model, step, batch.ids)
        loss = task.loss(model(batch.inputs), batch) + routing_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        end_step(model, step)
    after = scores(task, model)
    assert after["all"]["loss"] < 0.4 * before["all"]["loss"]


def test_models_are_equal_by_seed(clean: Path):
    states = [make_task(recipe(clean)).build_model().state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = replace(recipe(clean), training=Training(seed=1))
    assert not torch.equal(make_task(other).build_model().state_dict()["layers.0.weight"], states[0]["layers.0.weight"])


@pytest.mark.parametrize(
    ("model", "agreement"),
    [
        (Model(kind="conv"), False),
        (Model(kind="lcn"), False),
        (Model(gate=Gate(kind="fixed"), routing_loss=None, damping=None), True),
        (Model(gate=Gate(kind="conv")), True),
        (Model(gate=Gate(kind="lcn", region_map=True)), True),
        (Model(channels=[2, 1]), True),
        (Model(channels=[2, 1], gate=Gate(kind="conv")), False),
    ],
)
def test_which_models_have_a_routing_to_compare(clean: Path, model: Model, agreement: bool):
    task = make_task(replace(recipe(clean), model=model))
    result = scores(task, task.build_model())
    assert ("routing_agreement" in result["all"]) == agreement
    if model.gate.kind == "fixed":
        assert result["all"]["routing_agreement"] == 100


def test_looking_at_the_routing_leaves_the_gate_in_training(clean: Path):
    task = make_task(recipe(clean))
    layer = routed_by_region(task.build_model().train())
    assert routing_of(layer, torch.zeros(2, 1, *GRID)).shape == (1, *GRID)
    assert layer.gate.training


def test_noisy_targets_are_scored_beside_the_truth(noisy: Path):
    task = make_task(recipe(noisy, noise=0.5, noise_ratio=4.0))
    assert task.selection.score == "loss"
    assert task.samples("train").target_channels == ["observed"]
    model = perfect(task)
    result = scores(task, model)
    assert result["all"]["within_1pct"] == 100
    assert result["all"]["rmse"] < 1e-6
    noise_std = task.samples("train").store.constants["noise_std"]
    assert result["all"]["loss"] == pytest.approx((noise_std**2).mean(), rel=0.2)
    assert set(scores(task, model, "train")["region_0"]) == {"loss"}  # the truth is read only where it is scored
    batch = task.samples("train").fetch([0, 1])
    assert float(task.loss(model(batch.inputs), batch).detach()) == pytest.approx((noise_std**2).mean(), rel=0.5)


def test_noise_that_the_data_do_not_have(clean: Path, noisy: Path):
    with pytest.raises(DataError, match=r"set data\.noise=0\.5"):
        make_task(recipe(noisy, noise=0.1, noise_ratio=4.0))
    with pytest.raises(DataError, match=r"made with noise=0 but"):
        make_task(recipe(clean, noise=0.1))
    clean_model = make_task(recipe(noisy))  # the truth alone is there too
    assert clean_model.samples("test").target_channels == ["heat"]


def test_data_that_are_not_there(tmp_path: Path, clean: Path):
    with pytest.raises(DataError, match="smoe-hpc data heat"):
        make_task(recipe(tmp_path))
    make_heat(tmp_path / "other", runs=(1, 1, 1), grid=(8, 12), steps=2)
    (tmp_path / "other" / "heat_train.h5").unlink()
    (tmp_path / "other" / "heat_train.h5").symlink_to(clean / "heat_train.h5")
    task = make_task(recipe(tmp_path / "other"))
    with pytest.raises(DataError, match="test data stands on another grid"):
        task.samples("test")


def test_outputs_must_be_the_targets(clean: Path):
    with pytest.raises(ConfigError, match="2 outputs but there are 1 targets"):
        make_task(replace(recipe(clean), model=Model(channels=[2])))


def test_results_can_be_written(clean: Path):
    task = make_task(recipe(clean))
    json.dumps(scores(task, task.build_model()), allow_nan=False)


def test_processes_add_up(clean: Path):
    task = make_task(recipe(clean))
    model = task.build_model()
    whole = scores(task, model)
    boards = [task.score("test") for _ in range(2)]
    with torch.no_grad():
        for rank, board in enumerate(boards):
            for batch in Loader(task.samples("test"), rank=rank, world=2).evaluate(3):
                board.update(model(batch.inputs), batch, batch.valid)
    for name, total in boards[0].state().items():
        assert total.dtype == torch.float64
        total += boards[1].state()[name]
    summed = boards[0].result()
    for region in whole:
        assert summed[region] == pytest.approx(whole[region], rel=1e-12)
