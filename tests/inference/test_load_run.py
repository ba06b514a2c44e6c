"""A run's folder alone is enough: its network forecasts what evaluation computed, to the bit, without the training data."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from safetensors.torch import load_file

from smoe_hpc.config import Gate, Model, Optimizer, Recipe, RoutingLoss, Run
from smoe_hpc.errors import CheckpointError, ConfigError, DataError
from smoe_hpc.inference import TrainedModel, load_run, write_forecasts
from smoe_hpc.io import Grid, StoreWriter, open_dataset, open_store
from smoe_hpc.tasks import make_task
from smoe_hpc.training import train

from ..tasks import small_earth

RESNET = Model(network="resnet", kind="conv", width=4, blocks=1, ghost_batch=2, padding="periodic_longitude")
ROUTED = replace(
    RESNET,
    kind="smoe",
    num_experts=8,
    expert_order="id",
    gate=Gate(share=True),
    routing_loss=RoutingLoss(error_scale="loss_weight"),
)
CASES: dict[str, tuple[Model, dict[str, Any], str]] = {
    "resnet": (RESNET, {}, "float32"),
    "smoe": (ROUTED, {}, "bf16"),
    "smoe_continuous": (ROUTED, {"leads": [6, 24], "lead_mode": "continuous"}, "float32"),
    "two_leads": (RESNET, {"leads": [6, 24], "constants": []}, "float64"),
    "residual": (Model(kind="conv", channels=[4, 2], activation="leaky_relu", residual=True), {}, "float32"),
}


class Trained:
    """A run, what its task computes, and its data in a place of their own."""

    def __init__(self, folder: Path, case: str) -> None:
        self.store = small_earth.write_years(folder / "data")
        model, data, precision = CASES[case]
        recipe = small_earth.recipe(self.store, model, **data)
        training = replace(recipe.training, batch=8, precision=precision, max_steps=6, validate_every=3)
        self.recipe: Recipe = replace(
            recipe, optimizer=Optimizer(lr=1e-2), training=training, run=Run(pictures=False, checkpoint_every=100)
        )
        self.task = make_task(self.recipe)
        self.run = folder / "run"
        self.scores = train(self.recipe, self.task, run_dir=self.run, progress=False)


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "data").mkdir()
    return Trained(folder, request.param)


def evaluated(trained: Trained, network: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """[n] starts and [n, L, Ct, H, W] float32: what an evaluation of the test split computes in physical units."""
    from smoe_hpc.io.loading.loader import Loader

    samples, task, recipe = trained.task.samples("test"), trained.task, trained.recipe
    dtype = torch.float64 if recipe.training.precision == "float64" else torch.float32
    found = []
    with Loader(samples, dtype=dtype) as loader, torch.no_grad():
        for batch in loader.evaluate(recipe.training.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.precision == "bf16"):
                output = network(batch.inputs).to(dtype)
            count = len(small_earth.TARGETS)
            fields = [task.in_units(output[:, first : first + count]) for first in range(0, output.shape[1], count)]
            found.append(torch.stack(fields, dim=1)[batch.valid])
    values = torch.cat(found).float().numpy()
    starts = samples.store.coords["time"][samples.input_rows[:, -1]]
    if samples.window.by_lead:
        values = values.reshape(len(starts), len(samples.window.leads), *values.shape[2:])
    return starts, values


def stacked(forecast: xarray.Dataset) -> np.ndarray:
    """[n, L, Ct, H, W] of the targets z500 and tp."""
    return np.stack([forecast["geopotential"].sel(level=500).values, forecast["total_precipitation_6hr"].values], axis=2)


def test_forecasts_are_what_evaluation_computes(trained: Trained):
    model = load_run(trained.run)
    network = trained.task.build_model()
    if trained.recipe.training.precision == "float64":
        network = network.double()
    network.load_state_dict(load_file(trained.run / "weights.safetensors"))
    starts, expected = evaluated(trained, network.eval())
    forecast = model.forecast(trained.store, starts)
    assert np.array_equal(forecast["time"].values, starts.astype("datetime64[ns]"))
    assert forecast["prediction_timedelta"].values.tolist() == [
        np.timedelta64(lead, "h").astype("timedelta64[ns]").astype(int) for lead in trained.recipe.data.all_leads
    ]
    assert np.array_equal(stacked(forecast), expected)


def test_the_scores_follow_from_the_forecasts(trained: Trained):
    truth = open_dataset(trained.store)["fields"].sel(channel="z500")
    weights = small_earth.GRID.cos_latitude_weights()
    scores = trained.scores["test"]["all"]
    samples = trained.task.samples("test")
    starts = samples.store.coords["time"][samples.input_rows[:, -1]].astype("datetime64[ns]")
    forecast = load_run(trained.run).forecast(trained.store, starts)
    for number, lead in enumerate(trained.recipe.data.all_leads):
        chosen = forecast["geopotential"].sel(level=500, time=starts).isel(prediction_timedelta=number)
        errors = chosen.values - truth.sel(time=starts + np.timedelta64(lead, "h")).values
        rmse = np.sqrt((errors.astype(np.float64) ** 2 * weights).mean())
        assert rmse == pytest.approx(scores[f"rmse_z500_{lead}h"], rel=1e-5)


@pytest.fixture(scope="module")
def smoe(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("smoe")
    (folder / "data").mkdir()
    return Trained(folder, "smoe")


def test_a_fresh_process_without_the_training_data(smoe: Trained, tmp_path: Path):
    """Only three files of the run are copied; the newest start has no truth anywhere."""
    for name in ("model.json", "weights.safetensors", "fixed_fields.safetensors"):
        (tmp_path / name).write_bytes((smoe.run / name).read_bytes())
    recent = small_earth.write(tmp_path / "recent.h5", small_earth.TIMES[-3:], rows=slice(-3, None))
    hidden = smoe.store.rename(smoe.store.with_name("hidden"))
    try:
        code = f"""
import smoe_hpc
model = smoe_hpc.load_run({str(tmp_path)!r})
model.forecast({str(recent)!r}, "2016-01-18T18").to_netcdf({str(tmp_path / "out.nc")!r}, engine="h5netcdf")
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    finally:
        hidden.rename(smoe.store)
    with xarray.open_dataset(tmp_path / "out.nc") as found:
        again = load_run(smoe.run).forecast(smoe.store, "2016-01-18T18")
        xarray.testing.assert_identical(found.drop_encoding(), again)


def test_it_is_what_scorers_read(smoe: Trained):
    forecast = load_run(smoe.run).forecast(smoe.store, ["2016-01-12T00", "2016-01-12T06"])
    field = forecast["geopotential"]
    assert field.dims == ("time", "prediction_timedelta", "level", "latitude", "longitude")
    assert field.dtype == np.float32
    assert field.attrs == {"units": "m**2 s**-2", "long_name": "geopotential"}
    assert forecast["prediction_timedelta"].dtype == np.dtype("timedelta64[ns]")
    assert forecast["level"].values.tolist() == [500]
    assert forecast["latitude"].values.tolist() == small_earth.GRID.lat.tolist()
    assert 4e4 < float(field.mean()) < 6e4
    assert forecast.attrs["source"].endswith(f"recipe w, step {load_run(smoe.run).description.step}")


def test_from_a_dataset(smoe: Trained):
    model = load_run(smoe.run)
    expected = model.forecast(smoe.store, "2016-01-12T00")
    opened = open_dataset(smoe.store)
    xarray.testing.assert_allclose(model.forecast(opened, "2016-01-12T00"), expected, rtol=1e-5)
    by_variable = xarray.Dataset({name: opened["fields"].sel(channel=name, drop=True) for name in small_earth.CHANNELS})
    by_variable = by_variable.rename(lat="latitude", lon="longitude").isel(latitude=slice(None, None, -1))
    xarray.testing.assert_allclose(model.forecast(by_variable, "2016-01-12T00"), expected, rtol=1e-5)


def test_the_network_is_a_module_of_its_own(smoe: Trained):
    network = load_run(smoe.run).network
    weights = load_file(smoe.run / "weights.safetensors")
    shared = [name for name in network.state_dict() if name.endswith("gate.logits")]
    assert len(shared) > 1  # one tensor with several names
    assert sum(name in weights for name in shared) == 1
    network.load_state_dict(weights)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights.get(name, weights[shared[0]]))


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_written_in_pieces_it_is_the_same(smoe: Trained, tmp_path: Path, suffix: str):
    model = load_run(smoe.run)
    starts = small_earth.TIMES[90:101]
    path = tmp_path / f"out{suffix}"
    assert write_forecasts(path, model.forecasts(smoe.store, starts, batch=4)) == len(starts)
    opened = xarray.open_zarr(path) if suffix == ".zarr" else xarray.open_dataset(path)
    with opened:
        xarray.testing.assert_equal(opened.load(), model.forecast(smoe.store, starts, batch=4))
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    with pytest.raises(DataError, match=f"out{suffix} is there; remove it"):
        write_forecasts(path, model.forecasts(smoe.store, starts, batch=4))


def test_what_fails_half_way_leaves_nothing(smoe: Trained, tmp_path: Path):
    def pieces() -> Any:
        yield from load_run(smoe.run).forecasts(smoe.store, small_earth.TIMES[90:93], batch=2)
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        write_forecasts(tmp_path / "out.nc", pieces())
    assert list(tmp_path.iterdir()) == []


def other(folder: Path, **changes: Any) -> Path:
    """A store of three times that differs from the training data in one thing."""
    given: dict[str, Any] = {"grid": small_earth.GRID, "channels": small_earth.CHANNELS, "units": small_earth.UNITS, **changes}
    grid, channels = given["grid"], given["channels"]
    coords = given.get("coords", {"time": small_earth.TIMES[:3]})
    transforms = ["log:0.001" if name == "tp" else "none" for name in channels]
    with StoreWriter(folder / "other.h5", grid, channels, given["units"], coords=coords, transforms=transforms) as writer:
        writer.write(0, np.ones((3, len(channels), *grid.shape), dtype=np.float32))
    return folder / "other.h5"


ERRORS = [
    ({"channels": ["z500", "t850", "t2m"], "units": small_earth.UNITS[:3]}, "has no channel 'tp'"),
    ({"grid": Grid("latlon", small_earth.GRID.lat, np.arange(4) * 90.0)}, "stands on another grid"),
    ({"units": ["m", "K", "K", "m"]}, "units of channel 'z500' is 'm', the network learned from 'm2 s-2'"),
    ({"coords": {"run": np.zeros(3, int), "step": np.arange(3)}}, "has run, step, but the network forecasts from times"),
    (
        {"coords": {"time": small_earth.TIMES[[0, 2, 3]]}},
        r"has no field 2015-12-20T06:00, which the start 2015-12-20T12:00 needs \(offsets -12, -6, 0 h\); it has 3 fields",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_data_that_do_not_fit_are_one_error(smoe: Trained, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load_run(smoe.run).forecast(other(tmp_path, **changes), "2015-12-20T12")


def test_starts_and_leads_that_are_none(smoe: Trained):
    model = load_run(smoe.run)
    fraction = np.datetime64("2016-01-12T00:00:00.5")
    for starts in ("tomorrow", ["2016-01-12", "x"], np.datetime64("NaT"), 5, [1.5], fraction):
        with pytest.raises(DataError, match="give times such as 2017-01-01T00"):
            model.forecast(smoe.store, starts)
    for data in (None, [smoe.store], 3):
        with pytest.raises(DataError, match="give a store, the path of one, or an xarray Dataset"):
            model.forecast(data, "2016-01-12")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch=0: give 1 or more"):
        model.forecast(smoe.store, "2016-01-12", batch=0)
    with pytest.raises(DataError, match="no start is given"):
        model.forecast(smoe.store, [])
    with pytest.raises(ConfigError, match=r"forecasts \(24,\) at once"):
        model.forecast(smoe.store, "2016-01-12", leads=[6])


def copied(trained: Trained, folder: Path) -> Path:
    for name in ("model.json", "weights.safetensors", "fixed_fields.safetensors"):
        (folder / name).write_bytes((trained.run / name).read_bytes())
    return folder


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "fixed_fields.safetensors"])
def test_files_that_are_missing_or_changed(smoe: Trained, tmp_path: Path, name: str):
    path = copied(smoe, tmp_path) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is (not what was written|damaged)"):
        load_run(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_run(tmp_path / "nothing")


def test_a_later_format_is_named(smoe: Trained, tmp_path: Path):
    from smoe_hpc.files.writing import sha256_of_json, write_json

    path = copied(smoe, tmp_path) / "model.json"
    body = {**json.loads(path.read_text()), "format": 2}
    del body["sha256"]
    write_json(path, {**body, "sha256": sha256_of_json(body)})
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1; update smoe-hpc"):
        load_run(tmp_path)


def test_a_run_of_before_gets_its_description_when_it_is_trained_again(tmp_path: Path):
    (tmp_path / "data").mkdir()
    trained = Trained(tmp_path, "resnet")
    (trained.run / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.json: .* `smoe-hpc train`"):
        load_run(trained.run)
    train(trained.recipe, trained.task, run_dir=trained.run, progress=False)
    assert isinstance(load_run(trained.run), TrainedModel)
    assert len(open_store(trained.store).channels) == 4
