"""The whole way as a user goes it, command by command: a GRIB file, a store, a short training, forecasts, scores, pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("eccodes")
CHANGES = ["training.max_steps=50", "training.batch=8", "run.checkpoint_every=50"]


def command(folder: Path, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "COLUMNS": "200"}
    started = [sys.executable, "-m", "smoe_hpc", *map(str, arguments)]
    done = subprocess.run(started, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(folder: Path) -> Path:
    """March 2019 every hour on 3 x 4 points, as the Climate Data Store writes it."""
    from .io.convert.grib_files import write_grib

    return write_grib(folder / "made.grib", list(range(31 * 24)))


@pytest.mark.parametrize("source", ["made", pytest.param("real", marks=pytest.mark.real_data)])
def test_from_a_file_to_scores_and_pictures(source: str, tmp_path: Path, real_data_dir: Path):
    import xarray

    file = made(tmp_path) if source == "made" else real_data_dir / "era5-2mt-2019-03-uk.grib"
    (tmp_path / "data").mkdir()
    command(tmp_path, "data", "convert", file, "data/uk_t2m.h5")
    command(tmp_path, "train", "uk_t2m_smoe", *CHANGES)
    (tmp_path / "data").rename(tmp_path / "moved")  # a run needs its training data no more
    told = command(
        tmp_path, *("forecast", "runs/uk_t2m_smoe", "--data", "moved/uk_t2m.h5", "--out", "fc.nc"),
        *("--start", "2019-03-27T12", "--end", "2019-03-31T17", "--every", "1"),
    )  # fmt: skip
    assert "fc.nc: 102 forecasts of step" in told
    scores = json.loads((tmp_path / "runs/uk_t2m_smoe/scores.json").read_text())["test"]["all"]
    with xarray.open_dataset(tmp_path / "fc.nc") as forecast, xarray.open_dataset(tmp_path / "moved/uk_t2m.h5") as store:
        field = forecast["2m_temperature"].isel(prediction_timedelta=0)
        truth = store["fields"].isel(channel=0).sel(time=forecast["time"].values + np.timedelta64(6, "h"))
        weights = np.cos(np.deg2rad(forecast["latitude"].values))[:, None]
        errors = (field.values.astype(np.float64) - truth.values) ** 2 * weights / weights.mean()
    assert np.sqrt(errors.mean()) == pytest.approx(scores["rmse"], rel=1e-5)
    (tmp_path / "moved").rename(tmp_path / "data")
    evaluated = command(tmp_path, "evaluate", "runs/uk_t2m_smoe", "--json", "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["test"]["all"] == scores
    assert "persistence_rmse" in evaluated
    drawn = command(tmp_path, "report", "runs/uk_t2m_smoe").split()
    assert len(drawn) > 2
    assert all((tmp_path / path).read_bytes().startswith(b"\x89PNG") for path in drawn)
    if source == "real":
        assert scores["rmse"] < scores["persistence_rmse"]  # the published 1.957 K of all March, here of its last five days
