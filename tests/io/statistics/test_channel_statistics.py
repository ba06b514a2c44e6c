import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Store, open_store
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics import cache, channel_statistics
from smoe_hpc.io.statistics.cache import cache_file
from smoe_hpc.io.statistics.channel_statistics import Statistics, compute_statistics, statistics_of
from smoe_hpc.io.statistics.moments import Moments

from ..communicators import on_threads
from ..store_files import write

MARCH = Split("2019-03-01/2019-03-02")
YEAR = Split("2019-01-01/2019-12-31")


@pytest.mark.parametrize("slab_bytes", [1, 1 << 10, 1 << 30])
def test_streaming_equals_numpy(make_store, monkeypatch, slab_bytes):
    monkeypatch.setattr(channel_statistics, "_SLAB_BYTES", slab_bytes)
    store, fields = make_store(count=50)
    found = compute_statistics(store, MARCH)
    exact = fields[:48].astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.std, exact.std(axis=(0, 2, 3)), rtol=1e-12)
    assert found.count == 48 * 20
    only = compute_statistics(store, MARCH, ["z500"])
    assert only.channels == ("z500",)
    assert only.mean[0] == pytest.approx(found.mean[1], rel=1e-12)


@pytest.fixture(params=["float32", "int16"])
def real_magnitudes(tmp_path, request):
    """A folder of two files, 300 and 41 hours, of z50 and rain in its logarithm; the fields [341, 3, 4, 5] in stored space."""
    rng = np.random.default_rng(0)
    fields = np.stack(
        [2e5 + 3e3 * rng.normal(size=(341, 4, 5)), rng.gamma(0.3, 0.01, (341, 4, 5)), rng.normal(0, 1e-5, (341, 4, 5))], axis=1
    )
    encoding = Encoding.of_bounds(request.param, [165e3, -0.1, -1e-3], [215e3, 7.0, 1e-3])
    options = {"channels": ("z50", "tp", "q50"), "transforms": ["none", "log:0.001", "none"], "encoding": encoding}
    data = tmp_path / "data"
    write(data / "a.h5", fields[:300], "2019-03-01", **options)
    write(data / "b.h5", fields[300:], "2019-06-01", **options)
    fields[:, 1] = np.log(fields[:, 1] + 0.001) - np.log(0.001)
    return data, encoding.decode(encoding.encode(fields.astype(np.float32)))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_any_number_of_ranks_finds_the_same_to_the_bit_and_equals_numpy(real_magnitudes, world):
    folder, fields = real_magnitudes
    exact = fields.astype(np.float64)
    found = on_threads(world, lambda communicator: compute_statistics(open_store(folder), YEAR, communicator=communicator))
    alone = compute_statistics(open_store(folder), YEAR)
    assert found == [alone] * world
    std = exact.std(axis=(0, 2, 3))
    np.testing.assert_allclose(alone.std, std, rtol=1e-6)
    assert (np.abs(alone.mean - exact.mean(axis=(0, 2, 3))) <= 1e-6 * std).all()
    assert alone.count == 341 * 20
    assert alone.transforms == ("none", "log:0.001", "none")


@pytest.mark.mpi
@pytest.mark.parametrize("world", [2, 3])
def test_mpirun_finds_the_same(real_magnitudes, tmp_path, world):
    folder, _ = real_magnitudes
    alone = compute_statistics(open_store(folder), YEAR)
    command = ["mpirun", "--oversubscribe", "-n", str(world), sys.executable, "-m", "tests.io.statistics.shared_statistics"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[3], env=environment
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    expected = json.loads(json.dumps(asdict(alone)))
    assert told == [{"world": world, "statistics": expected, "ok": True, "samples": 341}] * world
    assert len(list((folder / "statistics").iterdir())) == 1


def test_an_error_of_one_rank_is_everybodys(make_store):
    store, _ = make_store(count=48, channels=("t2m", "tp"))
    with h5py.File(store.path, "r+") as file:
        file["fields"][40, 1, 2, 3] = np.nan
    found = on_threads(3, lambda communicator: compute_statistics(Store(store.path), MARCH, communicator=communicator))
    assert len({str(error) for error in found}) == 1
    message = r"store\.h5 time 2019-03-02T16:00:00, channel 'tp': 1 value is not finite, at lat 2, lon 3; write the file again"
    with pytest.raises(DataError, match=message):
        raise found[0]


def test_merging_is_exact_where_squares_would_cancel():
    fields = 5e4 + np.random.default_rng(0).normal(size=(64, 3, 8, 8))
    merged = Moments.of(fields[:7])
    for first in range(7, 64, 19):
        merged = merged.merge(Moments.of(fields[first : first + 19]))
    assert merged.count == 64 * 64
    np.testing.assert_allclose(merged.mean, fields.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(merged.squares / merged.count, fields.var(axis=(0, 2, 3)), rtol=1e-10)


def test_saved_and_loaded_unchanged(make_store, tmp_path):
    found = compute_statistics(make_store(transforms=["none", "log:10"])[0], Split("2019-03-01/2019-03-01"))
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


def cached(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name == "statistics")


def test_they_are_computed_once_and_again_for_anything_else(make_store, tmp_path, monkeypatch):
    store, _ = make_store(count=50)
    first = statistics_of(store, MARCH)
    (kept,) = cached(tmp_path)
    assert kept.parent == tmp_path / "statistics"
    assert kept.name.startswith("2019-03-01_2019-03-02-")
    with monkeypatch.context() as patched:
        patched.setattr(channel_statistics, "compute_statistics", None)  # would fail if it were called
        assert statistics_of(Store(store.path), MARCH) == first
    assert statistics_of(store, Split("2019-03-01/2019-03-01")) != first
    assert statistics_of(store, MARCH, ["z500", "t2m"]).mean == first.mean[::-1]
    assert len(cached(tmp_path)) == 3
    with h5py.File(store.path, "r+") as file:
        file["fields"][0] += 1
    assert statistics_of(Store(store.path), MARCH).mean[0] > first.mean[0]
    assert len(cached(tmp_path)) == 4


def test_a_damaged_cache_is_computed_anew(make_store, tmp_path):
    store, _ = make_store(count=50)
    first = statistics_of(store, MARCH)
    (kept,) = cached(tmp_path)
    whole = kept.read_text()
    other = replace(first, split="2019-03-02/2019-03-02")
    swapped = replace(first, channels=first.channels[::-1])
    transformed = replace(first, transforms=("none", "log:1"))
    for text in (whole[:50], whole.replace('"mean": ', '"mean": 1'), whole.replace('"sha256": "', '"sha256": "0'), other,
                 swapped, transformed):  # fmt: skip
        assert text != whole
        text.save(kept) if isinstance(text, Statistics) else kept.write_text(text)
        assert statistics_of(store, MARCH) == first
        assert kept.read_text() == whole
    assert Statistics.load(kept) == first


def test_statistics_that_were_edited_are_refused_by_name(make_store, tmp_path):
    path = tmp_path / "s.json"
    compute_statistics(make_store()[0], Split("2019-03-01/2019-03-01")).save(path)
    path.write_text(path.read_text().replace('"count": ', '"count": 1'))
    with pytest.raises(DataError, match=r"statistics .*s\.json cannot be used: they were changed since .*; remove the file"):
        Statistics.load(path)
    path.write_text(path.read_text().replace('"sha256"', '"sha"'))
    with pytest.raises(DataError, match=r"s\.json does not hold statistics"):
        Statistics.load(path)


def test_large_data_without_statistics_are_refused_with_the_command(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL_BYTES", 1000)
    store, _ = make_store(count=50)
    with pytest.raises(
        DataError, match=r"are not computed yet; run `smoe-hpc data statistics RECIPE data\.store=.*store\.h5` first \(srun or"
    ):
        statistics_of(store, MARCH)
    first = statistics_of(store, MARCH, compute="always")
    assert statistics_of(store, MARCH) == first


def test_many_at_once_all_get_them_and_one_file_stays(make_store, tmp_path):
    store, _ = make_store(count=50)
    results: list[Statistics] = []
    threads = [threading.Thread(target=lambda: results.append(statistics_of(Store(store.path), MARCH))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 8
    assert [path.suffix for path in cached(tmp_path)] == [".json"]
    assert on_threads(3, lambda communicator: statistics_of(store, MARCH, communicator=communicator)) == [results[0]] * 3


def test_beside_read_only_data_they_are_kept_with_the_user(make_store, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "data"
    place.mkdir()
    store, _ = make_store(name="data/store.h5", count=50)
    mount = ["mount", "--bind", str(place), str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root and the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        first = statistics_of(store, MARCH)
        (kept,) = cached(tmp_path)
        assert kept.parent == tmp_path / "cache" / "statistics"
        assert statistics_of(store, MARCH) == first
        assert cache_file(store, "climatology", [MARCH.text], ".npz").parent == tmp_path / "cache" / "climatology"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert cache_file(store, "statistics", [MARCH.text, ("t2m", "z500")], ".json") == kept  # found there ever after
    assert cache_file(store, "climatology", [MARCH.text], ".npz").parent == place / "climatology"


def test_statistics_that_cannot_be_kept_are_used_all_the_same(make_store, tmp_path, monkeypatch):
    store, _ = make_store(count=50)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(channel_statistics, "cache_file", lambda *_: tmp_path / "file" / "statistics.json")
    with pytest.warns(UserWarning, match="cannot write .*; the statistics are used but not kept"):
        assert statistics_of(store, MARCH) == compute_statistics(store, MARCH)


