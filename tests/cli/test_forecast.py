"""``smoe-hpc forecast``: from a run's folder and a store to a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray
from click.testing import Result
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.config import load_recipe
from smoe_hpc.inference import load_run
from smoe_hpc.io.synthetic.heat import make_heat
from smoe_hpc.tasks import make_task
from smoe_hpc.training import train

from ..inference.test_load_run import Trained


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="smoe-hpc")


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("weather")
    (folder / "data").mkdir()
    return Trained(folder, "smoe_continuous")


def test_several_starts_into_a_file(weather: Trained, tmp_path: Path):
    out = tmp_path / "fc.nc"
    options = ["--data", weather.store, "--start", "2016-01-11T00", "--end", "2016-01-12T12", "--every", "12", "--batch", "3"]
    done = run("forecast", weather.run, *options, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"{out}: 4 forecasts of step" in done.output
    with xarray.open_dataset(out) as found:
        assert found["time"].values.astype("datetime64[h]").astype(str).tolist() == [
            "2016-01-11T00", "2016-01-11T12", "2016-01-12T00", "2016-01-12T12",
        ]  # fmt: skip
        expected = load_run(weather.run).forecast(weather.store, list(found["time"].values), batch=3)
        xarray.testing.assert_equal(found.load(), expected)
    again = run("forecast", weather.run, *options, "--out", out)
    assert again.exit_code == 2
    assert "fc.nc is there; remove it, choose another name, or give --overwrite" in again.output
    assert run("forecast", weather.run, *options, "--out", out, "--overwrite", "--lead", "6").exit_code == 0
    with xarray.open_dataset(out) as found:
        assert found["prediction_timedelta"].values.tolist() == [6 * 3_600_000_000_000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "2016-01-30T00"], "has no field 2016-01-29T12:00, which the start 2016-01-30T00:00 needs"),
        (["--start", "soon"], "--start soon: "),
        (["--end", "2016-01-30T00"], "--end without --start"),
        (["--start", "2016-01-12", "--end", "2016-01-11"], "the later one at the end"),
        (["--out", "fc.grib"], "fc.grib: forecasts are written as .nc or .zarr"),
        (["--out", "no/where/fc.nc"], "its folder is missing or not writable"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(
    weather: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    done = run("forecast", weather.run, "--data", weather.store, "--out", "fc.nc", *options)
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_heat(tmp_path: Path):
    make_heat(tmp_path / "heat", (2, 2, 2), (12, 12), 6)
    recipe = load_recipe(
        "heat_smoe", [f"data.store={tmp_path / 'heat'}", "training.max_steps=4", "training.batch=4", "run.pictures=false"]
    )
    train(recipe, make_task(recipe), run_dir=tmp_path / "run", progress=False)
    test = tmp_path / "heat/heat_test.h5"
    assert run("forecast", tmp_path / "run", "--data", test, "--start", "5:6", "--out", tmp_path / "one.nc").exit_code == 0
    assert run("forecast", tmp_path / "run", "--data", test, "--out", tmp_path / "all.nc").exit_code == 0
    with xarray.open_dataset(tmp_path / "one.nc") as one, xarray.open_dataset(tmp_path / "all.nc") as every:
        assert one["heat"].dims == ("start", "lead", "row", "column")
        assert (int(one["run"][0]), int(one["step"][0])) == (5, 6)  # the last state, whose next is nowhere
        assert every.sizes["start"] == 2 * 7
        assert np.array_equal(one["heat"][0], every["heat"][-1])
    done = run("forecast", tmp_path / "run", "--data", test, "--start", "5:7", "--out", tmp_path / "none.nc")
    assert "has no field run 5 step 7, which the start run 5 step 7 needs (offsets 0 steps)" in done.output
    for step in (-1, 13, 1 << 40):
        start, message = f"4:{step}", f"run 4 step {step}"
        done = run("forecast", tmp_path / "run", "--data", test, "--start", start, "--out", tmp_path / "none.nc")
        assert f"has no field {message}, which the start {message} needs" in done.output  # of no other run either
