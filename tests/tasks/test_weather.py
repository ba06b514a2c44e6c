"""The weather task on a small made-up Earth: samples, scores against slow forms in numpy, leads, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.config import Data, Gate, Model, RoutingLoss, to_yaml
from smoe_hpc.errors import ConfigError, DataError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.climatology import WEEKS, climatology_of, compute_climatology, week_of
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.layers import spatial_layers
from smoe_hpc.tasks import RegionalTask, StoreTask, WeatherTask, make_task, prepare_data

from .small_earth import CHANNELS, GRID, SPLITS, TARGETS, TIMES, UNITS, recipe, values, write, write_years


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files."""
    return write_years(tmp_path_factory.mktemp("weather"))


def scores(task: StoreTask, model: torch.nn.Module, split: str = "test") -> dict[str, float]:
    board, samples = task.score(split), task.samples(split)
    items = [*samples.all_ids().tolist(), -1, -1]  # the last batch filled up
    with torch.no_grad():
        for first in range(0, len(items), 7):
            batch = samples.fetch(items[first : first + 7])
            board.update(model.eval()(batch.inputs), batch, batch.valid)
    result = board.result()
    assert set(result) == {"all"}
    return result["all"]


def rows_of(split: str) -> np.ndarray:
    first, last = (np.datetime64(day) for day in SPLITS[split].split("/"))
    return np.flatnonzero((first <= TIMES) & (TIMES.astype("datetime64[D]") <= last))


def weighted_rmse(forecast: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[C]: loops over channels, times and rows."""
    weights = np.cos(np.deg2rad(GRID.lat))
    weights = weights / weights.mean()
    result = []
    for channel in range(truth.shape[1]):
        total = 0.0
        for time in range(len(truth)):
            for row in range(GRID.shape[0]):
                total += weights[row] * ((forecast[time, channel, row] - truth[time, channel, row]) ** 2).sum()
        result.append(np.sqrt(total / (len(truth) * GRID.shape[0] * GRID.shape[1])))
    return np.array(result)


def slow_weekly(places: list[int]) -> np.ndarray:
    """[52, C, H, W] from the training rows, one week after another."""
    fields, train = values().astype(np.float64)[:, places], rows_of("train")
    day_of_year = np.array([int((t.astype("datetime64[D]") - t.astype("datetime64[Y]")).astype(int)) for t in TIMES[train]])
    weekly = np.empty((52, len(places), *GRID.shape))
    for week in range(52):
        mine = train[np.minimum(day_of_year // 7, 51) == week]
        weekly[week] = fields[mine].mean(0) if len(mine) else fields[train].mean(0)
    return weekly


def test_inputs_are_times_channels_constants(path: Path):
    task = make_task(recipe(path))
    assert isinstance(task, WeatherTask)
    samples = task.samples("train")
    assert (samples.in_channels, samples.out_channels) == (3 * 4 + 2, 2)
    batch = samples.fetch([0])
    lat = GRID.lat - GRID.lat.mean()
    torch.testing.assert_close(batch.inputs[0, 12, :, 0], torch.from_numpy(lat / lat.std()).float())
    assert samples.target_names == TARGETS


def test_dry_stays_zero(path: Path):
    task = make_task(recipe(path))
    tp = task.samples("train").fetch([3]).inputs[0, 11]
    first = values()[rows_of("train")[2 + 3], 3]
    assert torch.equal(tp == 0, torch.from_numpy(first == 0))
    assert (tp >= 0).all()
    log = np.log1p(values()[rows_of("train"), 3].astype(np.float64) / 1e-3)
    assert float(tp.max()) == pytest.approx(np.log1p(first.max() / 1e-3) / log.std(), rel=1e-5)


def test_scores_equal_slow_forms(path: Path):
    task = make_task(recipe(path))
    places = [CHANNELS.index(name) for name in TARGETS]
    fields, test = values().astype(np.float64)[:, places], rows_of("test")
    starts = test[2:-4]
    truth = fields[starts + 4]
    train = fields[rows_of("train")]

    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 2, *GRID.shape), 0.25, dtype=torch.float64)

    found = scores(task, Constant())
    log = np.log1p(train[:, 1] / 1e-3)
    forecast = np.stack(
        [
            np.full(truth[:, 0].shape, train[:, 0].mean() + 0.25 * train[:, 0].std()),
            np.full(truth[:, 0].shape, 1e-3 * np.expm1(0.25 * log.std())),
        ],
        axis=1,
    )
    weekly_means, weeks = slow_weekly(places), week_of(TIMES[starts + 4])
    assert len(set(weeks.tolist())) > 1
    usual = weekly_means[weeks]
    expected = {
        "rmse": weighted_rmse(forecast, truth),
        "persistence_rmse": weighted_rmse(fields[starts], truth),
        "climatology_rmse": weighted_rmse(np.broadcast_to(train.mean(0), truth.shape), truth),
        "weekly_climatology_rmse": weighted_rmse(usual, truth),
    }
    for name, of_channels in expected.items():
        for target, value in zip(TARGETS, of_channels, strict=True):
            assert found[f"{name}_{target}_24h"] == pytest.approx(value, rel=1e-5), name
    weights = np.cos(np.deg2rad(GRID.lat))[:, None]
    for channel, target in enumerate(TARGETS):
        ours, theirs = forecast[:, channel] - usual[:, channel], truth[:, channel] - usual[:, channel]
        each = [
            (weights * a * b).sum() / np.sqrt((weights * a * a).sum() * (weights * b * b).sum())
            for a, b in zip(ours, theirs, strict=True)
        ]
        assert found[f"acc_{target}_24h"] == pytest.approx(np.mean(each), abs=1e-5)
    assert task.selection.score == "loss"


def test_the_loss_is_weighted_and_scored_as_trained(path: Path):
    task = make_task(recipe(path))
    model = task.build_model().eval()
    samples = task.samples("test")
    batch = samples.fetch(samples.all_ids())
    with torch.no_grad():
        output = model(batch.inputs)
    weights = np.cos(np.deg2rad(GRID.lat))
    weights = torch.from_numpy(weights / weights.mean())[:, None]
    expected = (weights * (output - batch.targets).double().square()).mean()
    assert float(task.loss(output, batch)) == pytest.approx(float(expected), rel=1e-5)
    assert scores(task, model)["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_several_leads_at_once(path: Path):
    task = make_task(recipe(path, leads=[6, 24]))
    samples = task.samples("test")
    assert samples.target_names == ["z500_6h", "tp_6h", "z500_24h", "tp_24h"]
    found = scores(task, task.build_model())
    z, test = values().astype(np.float64)[:, :1], rows_of("test")
    for lead, steps in ((6, 1), (24, 4)):
        expected = weighted_rmse(z[test[2:-4]], z[test[2:-4] + steps])
        assert found[f"persistence_rmse_z500_{lead}h"] == pytest.approx(float(expected[0]), rel=1e-5)


def test_a_continuous_lead_is_told_and_scored_at_each(path: Path):
    task = make_task(recipe(path, leads=[6, 12, 24], lead_mode="continuous", validation_leads=[6, 24]))
    train, test = task.samples("train"), task.samples("test")
    assert train.in_channels == test.in_channels == 3 * 4 + 2 + 1
    batch = train.fetch(train.epoch_ids(seed=0, epoch=0)[:16])
    assert batch.leads is not None
    assert set(batch.leads.tolist()) == {6, 12, 24}
    torch.testing.assert_close(batch.inputs[:, -1, 0, 0], batch.leads.float() / 100)

    class Told(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, -1:].expand(-1, 2, -1, -1)

    found = scores(task, Told())
    assert {name.rpartition("_")[2] for name in found if name.startswith("rmse")} == {"6h", "24h"}
    z, test_rows = values().astype(np.float64)[:, :1], rows_of("test")
    z_train = z[rows_of("train")]
    starts = test_rows[2:-4]  # those of which both leads are stored
    for lead, steps in ((6, 1), (24, 4)):
        truth = z[starts + steps]
        forecast = np.full(truth.shape, z_train.mean() + lead / 100 * z_train.std())
        assert found[f"rmse_z500_{lead}h"] == pytest.approx(float(weighted_rmse(forecast, truth)[0]), rel=1e-5)
        expected = float(weighted_rmse(z[starts], truth)[0])
        assert found[f"persistence_rmse_z500_{lead}h"] == pytest.approx(expected, rel=1e-5)
        usual = slow_weekly([0])[week_of(TIMES[starts + steps])]
        expected = float(weighted_rmse(usual, truth)[0])
        assert found[f"weekly_climatology_rmse_z500_{lead}h"] == pytest.approx(expected, rel=1e-5)


def test_persistence_needs_the_target_among_the_inputs(path: Path):
    task = make_task(recipe(path, variables=["t850", "t2m"]))
    assert not any(name.startswith("persistence") for name in scores(task, task.build_model()))


def test_layers_know_the_weight_of_the_loss(path: Path):
    model = Model(
        network="resnet", width=4, blocks=1, ghost_batch=2, num_experts=6, routing_loss=RoutingLoss(error_scale="loss_weight")
    )
    network = make_task(recipe(path, replace(model, gate=Gate(share=True), expert_order="id"))).build_model()
    layers = spatial_layers(network)
    assert len(layers) == 2
    for layer in layers:
        assert layer.gate is layers[0].gate
        assert layer.loss_weight is not None
        torch.testing.assert_close(layer.loss_weight.double(), torch.from_numpy(GRID.cos_latitude_weights()))


class Rank:
    """One of several ranks, run one after the other: what others gave is known from an earlier round."""

    def __init__(self, rank: int, world: int, given: dict[int, list[Any]]) -> None:
        self.rank, self.world, self._given, self._calls = rank, world, given, 0

    def gather(self, value: Any) -> list[Any]:
        known = self._given.setdefault(self._calls, [None] * self.world)
        known[self.rank] = value
        self._calls += 1
        return [[] if part is None else part for part in known]


@pytest.mark.parametrize("world", [2, 3])
def test_a_climatology_is_the_same_for_any_number_of_ranks(path: Path, world: int):
    store, split = open_store(path), Split(SPLITS["train"])
    alone = compute_climatology(store, split, TARGETS)
    given: dict[int, list[Any]] = {}
    for rank in range(world - 1):
        with pytest.raises((ValueError, TypeError)):  # the ranks after it have not given theirs yet
            compute_climatology(store, split, TARGETS, Rank(rank, world, given))
    shared = compute_climatology(store, split, TARGETS, Rank(world - 1, world, given))
    assert np.array_equal(shared.mean, alone.mean)
    assert np.array_equal(shared.weekly, alone.weekly)
    places = [CHANNELS.index(name) for name in TARGETS]
    np.testing.assert_allclose(alone.mean, values().astype(np.float64)[rows_of("train")][:, places].mean(0), rtol=1e-5)
    assert alone.weekly.shape == (WEEKS, 2, *GRID.shape)


def test_what_is_prepared_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch):
    statistics, climatology = prepare_data(recipe(path))
    assert statistics.channels == ("z500", "t850", "t2m", "tp")

    def refuse(*arguments: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("smoe_hpc.io.statistics.climatology.compute_climatology", refuse)
    monkeypatch.setattr("smoe_hpc.io.statistics.channel_statistics.compute_statistics", refuse)
    task = make_task(recipe(path))
    assert isinstance(task, WeatherTask)
    assert np.array_equal(task.climatology.weekly, climatology.weekly)


def test_large_data_are_prepared_first(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smoe_hpc.io.statistics.cache.SMALL_BYTES", 1000)
    with pytest.raises(DataError, match=r"run `smoe-hpc data statistics RECIPE data\.store="):
        climatology_of(open_store(path), Split("2015-12-21/2015-12-30"), TARGETS)


def test_a_damaged_cache_is_computed_anew(path: Path):
    store, split = open_store(path), Split("2015-12-20/2015-12-29")
    first = climatology_of(store, split, TARGETS)
    for file in (path / "climatology").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    again = climatology_of(store, split, TARGETS)
    assert np.array_equal(first.weekly, again.weekly)


def test_a_region_is_no_weather(tmp_path: Path):
    region = Grid("latlon", GRID.lat, np.arange(8) * 1.0)
    write(tmp_path / "region.h5", grid=region)
    with pytest.raises(DataError, match="set task=regional"):
        make_task(recipe(tmp_path / "region.h5"))


def test_a_hole_is_refused_unless_it_is_skipped(tmp_path: Path):
    kept = np.delete(np.arange(len(TIMES)), 9)
    with StoreWriter(tmp_path / "hole.h5", GRID, CHANNELS, UNITS, coords={"time": TIMES[kept]}) as writer:
        writer.write(0, values()[kept])
    holed = recipe(tmp_path / "hole.h5", constants=[])
    with pytest.raises(DataError, match=r"2015-12-22.*data.gaps=skip"):
        make_task(holed)
    task = make_task(replace(holed, data=replace(holed.data, gaps="skip")))
    assert len(task.samples("train")) < len(rows_of("train")) - 6


def test_only_weather_is_prepared(path: Path):
    regional = replace(recipe(path), task="regional", data=Data(store=str(path), splits=SPLITS, normalize=True))
    with pytest.raises(ConfigError, match="nothing to prepare"):
        prepare_data(regional)
    assert isinstance(make_task(recipe(path)), RegionalTask)  # which pictures in units rest on


def test_the_command_prepares_and_says_what_it_found(path: Path, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe(path)))
    arguments = ["data", "statistics", str(tmp_path / "recipe.yaml"), "data.splits.train=2015-12-20/2015-12-31"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "statistics.json")])
    assert done.exit_code == 0, done.output
    assert "z500  mean" in done.output
    found = json.loads((tmp_path / "statistics.json").read_text())
    z500 = values()[TIMES.astype("datetime64[Y]") == np.datetime64("2015"), 0].astype(np.float64)
    assert found["channels"]["z500"] == pytest.approx({"mean": z500.mean(), "std": z500.std()}, rel=1e-6)
    assert found["count"] == z500.size
    assert list((path / "climatology").glob("2015-12-20_2015-12-31-*.npz"))
