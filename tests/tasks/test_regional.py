"""Forecasts from a store of times."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smoe_hpc.config import Data, Model, Recipe, RoutingLoss, Splits
from smoe_hpc.errors import DataError, SmoeError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.tasks import RegionalTask, make_task

GRID = Grid("latlon", np.array([50.0, 60.0, 70.0]), np.array([350.0, 351.0, 352.0, 353.0]))
TIMES = np.datetime64("2019-03-01T00") + np.arange(4 * 20) * np.timedelta64(6, "h")
SPLITS = Splits(train="2019-03-01/2019-03-10", validation="2019-03-11/2019-03-14", test="2019-03-15/2019-03-20")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("regional") / "store.h5"
    rng = np.random.default_rng(0)
    fields = np.empty((len(TIMES), 2, *GRID.shape), np.float32)
    fields[:, 0] = 280 + 5 * rng.standard_normal((len(TIMES), *GRID.shape))
    fields[:, 1] = 1e5 + 1e3 * rng.standard_normal((len(TIMES), *GRID.shape))
    with StoreWriter(file, GRID, ["t2m", "msl"], ["K", "Pa"], coords={"time": TIMES}) as writer:
        writer.write(0, fields)
    return file


def recipe(path: Path, **data) -> Recipe:
    arguments = {"inputs": [-12, -6, 0], "lead": 6, "splits": SPLITS, "normalize": True, "variables": ["t2m"], **data}
    model = Model(kind="conv", channels=[1], residual=True)
    return Recipe(name="r", task="regional", data=Data(store=str(path), **arguments), model=model)


def scores(task, model, split="test") -> dict[str, float]:
    board = task.score(split)
    with torch.no_grad():
        for batch in Loader(task.samples(split)).evaluate(5):
            board.update(model(batch.inputs), batch, batch.valid)
    result = board.result()
    assert set(result) == {"all"}
    return result["all"]


def silence(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


@pytest.mark.parametrize("normalize", [True, False])
def test_a_residual_model_that_says_nothing_is_persistence(path: Path, normalize: bool):
    task = make_task(recipe(path, normalize=normalize))
    assert isinstance(task, RegionalTask)
    result = scores(task, silence(task.build_model()))
    assert result["rmse"] == pytest.approx(result["persistence_rmse"], rel=1e-6)
    rows = [i for i, t in enumerate(TIMES) if t >= np.datetime64("2019-03-15")]
    fields = task.store.read(rows, ["t2m"])[:, 0].astype(np.float64)
    square = (fields[2:-1] - fields[3:]) ** 2  # starts 12 h into the split, target within it
    expected = np.sqrt((square * GRID.cos_latitude_weights()).mean())
    assert result["persistence_rmse"] == pytest.approx(expected, rel=1e-5)
    assert result["rmse_area"] == pytest.approx(result["rmse"])  # even rows: both weights are the cosine
    assert task.selection.score == "rmse"
    assert task.selection.mode == "min"


def test_the_loss_is_that_of_normalised_fields(path: Path):
    task = make_task(recipe(path))
    model = task.build_model()
    batch = task.samples("test").fetch(range(len(task.samples("test"))))
    with torch.no_grad():
        loss = float(task.loss(model(batch.inputs), batch))
    result = scores(task, model)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    std = float(task.samples("train").target_std)
    assert result["rmse"] == pytest.approx(std * loss**0.5, rel=1e-5)
    assert 4 < std < 6
    assert abs(float(batch.inputs.mean())) < 0.2


def test_targets_are_found_in_the_newest_frame(path: Path):
    two = recipe(path, variables=["t2m", "msl"], targets=["msl", "t2m"])
    task = make_task(replace(two, model=Model(kind="conv", channels=[2], residual=True)))
    assert task.newest() == [5, 4]
    result = scores(task, silence(task.build_model()))
    for name, low, high in (("t2m", 5, 10), ("msl", 1000, 2000)):  # white noise: sqrt(2) standard deviations
        assert low < result[f"rmse_{name}"] < high
        assert result[f"rmse_{name}"] == pytest.approx(result[f"persistence_rmse_{name}"], rel=1e-5)
    assert "rmse" not in result
    assert task.selection.score == "loss"


def test_a_target_that_is_no_input_has_no_persistence(path: Path):
    other = recipe(path, variables=["msl"], targets=["t2m"])
    plain = replace(other, model=Model(kind="conv", channels=[1]))
    task = make_task(plain)
    result = scores(task, task.build_model())
    assert "persistence_rmse" not in result
    with pytest.raises(SmoeError, match=r"model\.residual"):
        make_task(other).build_model()


def test_layers_are_told_the_weight_of_the_loss(path: Path):
    model = Model(num_experts=3, routing_loss=RoutingLoss(error_scale="loss_weight"), damping=None)
    task = make_task(replace(recipe(path), model=model))
    (layer,) = task.build_model().layers
    torch.testing.assert_close(layer.loss_weight.double(), torch.from_numpy(GRID.cos_latitude_weights()), rtol=1e-6, atol=0)


def test_stores_that_do_not_fit(path: Path, tmp_path: Path):
    with pytest.raises(DataError, match="t2m"):
        make_task(recipe(path, variables=["t2n"]))
    with pytest.raises(DataError):
        make_task(recipe(tmp_path / "missing.h5"))
    runs = {"run": np.zeros(3, np.int64), "step": np.arange(3)}
    with StoreWriter(tmp_path / "runs.h5", Grid.plane(3, 4), ["t2m"], ["1"], coords=runs) as writer:
        writer.write(0, np.zeros((3, 1, 3, 4), np.float32))
    with pytest.raises(DataError, match="set task=heat"):
        make_task(recipe(tmp_path / "runs.h5"))
