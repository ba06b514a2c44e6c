import json

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import statistics
from smoe_hpc.io.samples import Split
from smoe_hpc.io.statistics import Moments, Statistics, compute_statistics


@pytest.mark.parametrize("slab_bytes", [1, 1 << 10, 1 << 30])
def test_streaming_equals_numpy(make_store, monkeypatch, slab_bytes):
    monkeypatch.setattr(statistics, "_SLAB_BYTES", slab_bytes)
    store, fields = make_store(count=50)
    found = compute_statistics(store, Split("2019-03-01/2019-03-02"))
    exact = fields[:48].astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.std, exact.std(axis=(0, 2, 3)), rtol=1e-12)
    assert found.count == 48 * 20
    only = compute_statistics(store, Split("2019-03-01/2019-03-02"), ["z500"])
    assert only.channels == ("z500",)
    assert only.mean[0] == pytest.approx(found.mean[1], rel=1e-12)


def test_merging_is_exact_where_squares_would_cancel():
    fields = 5e4 + np.random.default_rng(0).normal(size=(64, 3, 8, 8))
    merged = Moments.of(fields[:7])
    for first in range(7, 64, 19):
        merged = merged.merge(Moments.of(fields[first : first + 19]))
    assert merged.count == 64 * 64
    np.testing.assert_allclose(merged.mean, fields.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(merged.squares / merged.count, fields.var(axis=(0, 2, 3)), rtol=1e-10)


def test_saved_and_loaded_unchanged(make_store, tmp_path):
    found = compute_statistics(make_store()[0], Split("2019-03-01/2019-03-01"))
    found.save(tmp_path / "run" / "statistics.json")
    assert Statistics.load(tmp_path / "run" / "statistics.json") == found
    assert list(json.loads((tmp_path / "run" / "statistics.json").read_text())["channels"]) == ["t2m", "z500"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["statistics.json"]


def test_selects_by_name_and_refuses_other_channels():
    found = Statistics(("t2m", "z500"), (280.0, 5e4), (10.0, 3e3), 100, "0:1")
    mean, std = found.select(["z500", "t2m"])
    assert mean.ravel().tolist() == [5e4, 280]
    assert std.shape == (2, 1, 1)
    with pytest.raises(DataError, match="statistics are of other channels: they lack 't2n'; did you mean 't2m'"):
        found.select(["t2n"])


def test_what_cannot_normalise_is_refused(make_store, tmp_path):
    with pytest.raises(DataError, match="'t2m' has mean 1 and std 0: it cannot be normalised"):
        Statistics(("t2m",), (1.0,), (0.0,), 4, "0:1")
    with pytest.raises(DataError, match="holds no field"):
        compute_statistics(make_store()[0], Split("2020-01-01/2020-01-02"))
    with pytest.raises(DataError, match="cannot read statistics"):
        Statistics.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="does not hold statistics"):
        Statistics.load(tmp_path / "other.json")
