"""Inputs without truth, and what a batch says of when and where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, open_store
from smoe_hpc.io.loading.inputs import input_batch
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import compute_statistics

from ..conftest import HOUR, hourly
from .made_samples import WINDOWS, make_samples

RUNS = {"run": np.repeat([0, 1], 6), "step": np.tile(np.arange(6), 2)}


@pytest.mark.parametrize("dtype", ["float32", "int16"])
@pytest.mark.parametrize("kind", list(WINDOWS))
def test_inputs_are_those_of_training_to_the_bit(make_store, kind, dtype):
    samples, _ = make_samples(make_store, kind, dtype)
    window, chosen = samples.window, np.array([7, 0, 3])
    number = 1 if window.by_lead else 0
    lead = window.leads[number] if window.by_lead else None
    batch = samples.fetch(chosen * len(window.leads) + number if window.by_lead else chosen)
    settings = samples.store, samples.statistics, window, samples.input_channels, samples.constants
    found = input_batch(*settings, batch.times, lead=lead, grid=samples.grid)
    assert torch.equal(found.inputs, batch.inputs)
    assert found.targets.shape == (3, 0, 4, 5)
    assert torch.equal(found.leads, batch.leads)
    assert found.times.tolist() == batch.times.tolist()
    assert found.grid is samples.grid


def test_a_start_needs_its_inputs_alone(make_store):
    store, fields = make_store(count=12, coords={"time": np.delete(hourly(13), 5)})
    window = Window((-1, 0), 72)
    batch = input_batch(store, None, window, ["z500"], [], hourly(13)[[12, 1]])
    np.testing.assert_array_equal(batch.inputs.numpy(), fields[[[10, 11], [0, 1]], 1])
    with pytest.raises(DataError, match=r"store.h5: 2019-03-01T05:00:00 is not stored, which the start 2019-03-01T06 needs"):
        input_batch(store, None, window, ["z500"], [], hourly(13)[[12, 6]])
    with pytest.raises(DataError, match=r"2019-02-28T23:00:00 is not stored, .*there are 12 fields"):
        input_batch(store, None, window, ["z500"], [], hourly(1))


def test_runs_and_steps_start_too(make_store):
    store, fields = make_store(count=12, coords=RUNS)
    window = Window((-2, 0), 40)
    batch = input_batch(store, None, window, ["t2m"], [], np.array([[1, 2], [0, 5]]))
    np.testing.assert_array_equal(batch.inputs.numpy(), fields[[[6, 8], [3, 5]], 0])
    assert {name: values.tolist() for name, values in batch.starts.items()} == {"run": [1, 0], "step": [2, 5]}
    with pytest.raises(DataError, match="have no times; they are named by run, step"):
        _ = batch.times
    for start in ([1, 1], [0, 6], [0, 7], [0, -1], [1, -10], [0, 16], [2, 3], [0, 1 << 40]):
        with pytest.raises(DataError, match=r"store.h5: run \d, step -?\d+ is not stored"):
            input_batch(store, None, window, ["t2m"], [], np.array([start]))
    with pytest.raises(DataError, match=r"give \[run, step\] of each start"):
        input_batch(store, None, window, ["t2m"], [], hourly(1))


@pytest.mark.parametrize(
    "starts", [np.array([0]), hourly(2)[None], np.array(["NaT"], "datetime64[s]"), hourly(1) + np.timedelta64(1, "ms")]
)
def test_starts_that_are_no_times_are_refused(make_store, starts):
    with pytest.raises(DataError, match="give a datetime64 of whole seconds for each"):
        input_batch(make_store()[0], None, Window((0,), 1), ["t2m"], [], starts)


def test_what_the_model_does_not_know_is_refused(make_store):
    store, _ = make_store(transforms=["none", "log:10"])
    statistics = compute_statistics(store, Split("2019-03-01/2019-03-01"))
    window, starts = Window((0,), (1, 2), "drawn"), hourly(1)
    assert input_batch(store, statistics, window, ["z500"], [], starts, lead=2).leads.tolist() == [2]
    with pytest.raises(DataError, match="lead 3 is not one of the window's: 1, 2"):
        input_batch(store, statistics, window, ["z500"], [], starts, lead=3)
    with pytest.raises(DataError, match="no channel 't2n'; did you mean 't2m'"):
        input_batch(store, statistics, window, ["t2n"], [], starts, lead=1)
    with pytest.raises(DataError, match="no constant 'orography'; it has none"):
        input_batch(store, statistics, window, ["t2m"], ["orography"], starts, lead=1)
    with pytest.raises(DataError, match=r"store.h5 stands on another grid .*: 4 x 5 plane, expected 5 x 5 plane"):
        input_batch(store, statistics, window, ["t2m"], [], starts, lead=1, grid=Grid.plane(5, 5))
    other, _ = make_store(name="other.h5")
    with pytest.raises(DataError, match=r"of 'z500' are of transform 'log:10', but .*other\.h5 holds 'none'; write the store"):
        input_batch(other, statistics, window, ["t2m", "z500"], [], starts, lead=1)
    third, _ = make_store(channels=("t2m", "q500"), name="third.h5")
    with pytest.raises(DataError, match="other channels: they lack 'q500'"):
        input_batch(third, statistics, window, ["q500"], [], starts, lead=1)


@pytest.mark.parametrize("backend", ["threads", pytest.param("dali", marks=pytest.mark.dali)])
def test_batches_say_when_they_start_and_where_they_are(make_store, backend):
    times = hourly(30)
    store = open_store(make_store(count=30)[0].path)
    samples = Samples(store, Window((-3, -1), (1, 2), "each"))
    with Loader(samples, backend=backend) as loader:
        batches = list(loader.evaluate(20))
    starts = np.concatenate([batch.times for batch in batches])
    assert np.isnat(starts[len(samples) :]).all()
    assert starts[: len(samples)].tolist() == np.repeat(times[3:28], 2).tolist()  # an hour after the newest input
    assert batches[0].times.dtype == "datetime64[s]"
    assert all(batch.grid is store.grid for batch in batches)
    assert (samples.fetch([4]).times == times[5]).all()
    rows = samples.input_rows[:, -1]
    assert (store.coords["time"][rows] + HOUR == times[3:28]).all()
    runs = Samples(make_store(count=12, coords=RUNS, name="runs.h5")[0], Window((-1,), 1))
    batch = runs.fetch([0, -1, 5])
    assert {name: values.tolist() for name, values in batch.starts.items()} == {"run": [0, -1, 1], "step": [1, -1, 2]}
