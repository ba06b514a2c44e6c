"""What a batch says of when and where it is."""

from __future__ import annotations

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import open_store
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.windows import Window

from ..conftest import HOUR, hourly

RUNS = {"run": np.repeat([0, 1], 6), "step": np.tile(np.arange(6), 2)}


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
    with pytest.raises(DataError, match="have no times; they are named by run, step"):
        _ = batch.times
