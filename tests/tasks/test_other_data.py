"""A run evaluated on other years and other stores: scaled as its training data, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.errors import ConfigError, DataError
from smoe_hpc.experiments import evaluate
from smoe_hpc.io.synthetic.heat import make_heat

from ..inference.test_load_run import Trained, other
from . import small_earth


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("weather")
    (folder / "data").mkdir()
    return Trained(folder, "smoe")


def test_the_days_of_the_test_split_give_its_scores(trained: Trained):
    scores = evaluate(trained.run, first="2016-01-11", last="2016-01-18")
    assert scores == trained.scores["test"]
    assert evaluate(trained.run, data=trained.store, first="2016-01-05", last="2016-01-10") == trained.scores["validation"]


def test_without_the_training_data_what_needs_them_is_left_out(trained: Trained, tmp_path: Path):
    days = slice(88, 120)  # from 2016-01-11 on
    store = small_earth.write(tmp_path / "years.h5", small_earth.TIMES[days], rows=days)
    hidden = trained.store.rename(trained.store.with_name("hidden"))
    try:
        with pytest.warns(UserWarning, match="scores against the climatology of the training split are left out: .*data"):
            scores = evaluate(trained.run, data=store)["all"]
        result = CliRunner().invoke(
            app, ["evaluate", str(trained.run), "--data", str(store), "--json", str(tmp_path / "s.json")]
        )
    finally:
        hidden.rename(trained.store)
    expected = trained.scores["test"]["all"]
    assert scores == {
        name: value for name, value in expected.items() if "climatology" not in name and not name.startswith("acc")
    }
    assert len(scores) < len(expected)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "s.json").read_text()) == {"first day to last day": {"all": scores}}


def test_what_does_not_fit(trained: Trained, tmp_path: Path):
    with pytest.raises(DataError, match="has no channel 'tp'"):
        evaluate(trained.run, data=other(tmp_path, channels=["z500", "t850", "t2m"], units=["m2 s-2", "K", "K"]))
    with pytest.raises(DataError, match=r"split '2016-02-01/2016-02-02'.* holds no field"):
        evaluate(trained.run, first="2016-02-01", last="2016-02-02")


def test_heat_goes_by_runs(tmp_path: Path):
    from smoe_hpc import train

    make_heat(tmp_path / "heat", (4, 2, 2), (12, 12), 10)
    make_heat(tmp_path / "more", (4, 2, 2), (12, 12), 10, seed=1)
    changes = {
        "data.store": tmp_path / "heat",
        "run.root": tmp_path,
        "training.max_steps": 2,
        "training.batch": 8,
        "run.pictures": False,
    }
    scores = train("heat_conv1", changes, progress=False)
    assert evaluate(tmp_path / "heat_conv1", data=tmp_path / "heat") == scores["test"]
    assert evaluate(tmp_path / "heat_conv1", data=tmp_path / "more") != scores["test"]
    with pytest.raises(ConfigError, match="task=heat goes by runs, not by days"):
        evaluate(tmp_path / "heat_conv1", first="2016-01-01")
