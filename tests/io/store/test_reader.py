import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Grid, Store, open_dataset
from smoe_hpc.io.checks.inspect import describe_store
from smoe_hpc.io.checks.verify import verify

from ..conftest import hourly
from ..store_files import compressed_copy


def test_reads_what_was_written(make_store):
    store, fields = make_store()
    assert store.direct
    assert store.channels == ["t2m", "z500"]
    assert store.units == ["K", "K"]
    assert (store.coords["time"] == hourly(12)).all()
    assert store.grid.same_as(Grid.plane(4, 5))
    rows = [11, 0, 0, 7]
    np.testing.assert_array_equal(store.read(rows), fields[rows])


@pytest.mark.parametrize("channels", [("a",), ("c", "a"), ("b", "c"), ("c", "b", "a"), ("a", "b", "c", "d"), ()])
def test_reads_channels_in_the_order_asked_for(make_store, channels):
    store, fields = make_store(channels=("a", "b", "c", "d"))
    places = ["abcd".index(name) for name in channels]
    for reader in (store, compressed_copy(store, compression="gzip")):
        np.testing.assert_array_equal(reader.read([3, 1], channels), fields[[3, 1]][:, places])


@pytest.mark.parametrize(
    "filters", [{"compression": "gzip"}, {"shuffle": True}, {"compression": "lzf", "fletcher32": True}]
)
def test_compressed_chunks_are_read_through_hdf5(make_store, filters):
    store, fields = make_store()
    other = compressed_copy(store, **filters)
    assert not other.direct
    np.testing.assert_array_equal(other.read([5, 2]), fields[[5, 2]])


def test_chunks_without_checksums_are_read_directly(make_store):
    store, fields = make_store()
    other = compressed_copy(store)
    assert other.direct
    np.testing.assert_array_equal(other.read([5, 2]), fields[[5, 2]])


def test_reads_into_given_memory_only_when_it_fits(make_store):
    store, fields = make_store()
    out = np.empty((2, 2, 4, 5), np.float32)
    assert store.read([1, 2], out=out) is out
    np.testing.assert_array_equal(out, fields[1:3])
    with pytest.raises(DataError, match="must be C-contiguous float32"):
        store.read([1, 2, 3], out=out)


def test_a_pickled_store_reads_in_another_process(make_store):
    store, fields = make_store()
    store.read([0])
    code = "import pickle,sys; s=pickle.load(sys.stdin.buffer); print(float(s.read([3]).astype('f8').sum()))"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True, cwd=root
    )
    assert float(done.stdout) == float(fields[3].astype(np.float64).sum())


def test_many_threads_read_at_once(make_store):
    store, fields = make_store(count=40)
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            rows = rng.integers(0, 40, 8)
            if not np.array_equal(store.read(rows), fields[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16"])
@pytest.mark.parametrize("compression", [None, "gzip", "zstd", "lz4", "blosc"])
def test_every_type_is_read_alike_however_it_is_compressed(make_store, dtype, compression):
    if compression not in (None, "gzip"):
        pytest.importorskip("hdf5plugin")
    encoding = Encoding.of_bounds(dtype, [-8.0] * 4, [8.0] * 4)
    store, fields = make_store(channels=("a", "b", "c", "d"), encoding=encoding, compression=compression)
    assert store.direct == (compression is None)
    with h5py.File(store.path) as file:
        assert file["fields"].fletcher32
    for channels in (None, ("b", "c"), ("d", "a")):
        places = [0, 1, 2, 3] if channels is None else ["abcd".index(name) for name in channels]
        expected = encoding.decode(encoding.encode(fields))[[7, 0, 11]][:, places]
        np.testing.assert_allclose(expected, fields[[7, 0, 11]][:, places], atol=4e-3)
        for check in (False, True):
            np.testing.assert_array_equal(store.read([7, 0, 11], channels, check=check), expected)
            out = np.zeros((3, len(places), 4, 5), encoding.stored_type)
            assert store.read_stored([7, 0, 11], channels, out, check) is out
            np.testing.assert_array_equal(encoding.select(places).decode(out), expected)


def test_stored_numbers_go_only_into_memory_of_their_type(make_store):
    store, _ = make_store(encoding=Encoding.of_bounds("int16", [-8.0] * 2, [8.0] * 2))
    with pytest.raises(DataError, match=r"out is float32 .*; it must be C-contiguous int16"):
        store.read_stored([0], out=np.empty((1, 2, 4, 5), np.float32))
    with pytest.raises(DataError, match="must be C-contiguous float32"):
        store.read([0], out=np.empty((1, 2, 4, 5), np.int16))


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_a_pickled_compressed_store_reads_in_another_process(make_store, dtype):
    pytest.importorskip("hdf5plugin")
    encoding = Encoding.of_bounds(dtype, [-8.0] * 2, [8.0] * 2)
    store, _ = make_store(encoding=encoding, compression="zstd")
    expected = float(store.read([3]).astype("f8").sum())
    code = "import pickle,sys; s=pickle.load(sys.stdin.buffer); print(float(s.read([3]).astype('f8').sum()))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert float(done.stdout) == expected


@pytest.mark.parametrize("what", ["reading", "writing"])
def test_a_missing_compressor_is_one_error(make_store, tmp_path, what):
    pytest.importorskip("hdf5plugin")
    store, _ = make_store(compression="zstd")
    action = "Store(path)" if what == "reading" else (
        "StoreWriter(path + '2', Grid.plane(2, 2), ['a'], ['1'], coords={'run': [0]}, compression='zstd')"
    )
    (tmp_path / "hdf5plugin.py").write_text("raise ImportError('not here')")
    code = f"from smoe_hpc.io import *; path = {str(store.path)!r}; {action}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], env=environment
    )
    reason = "store.h5 is compressed with zstd" if what == "reading" else "compression 'zstd' was asked for"
    assert f"{reason}, but hdf5plugin is not installed; pip install 'smoe-hpc[convert]'" in done.stderr


def test_members_may_share_a_time(make_store):
    coords = {"time": np.repeat(hourly(6), 2), "member": np.tile([0, 1], 6)}
    store, fields = make_store(coords=coords)
    with open_dataset(store.path) as decoded:
        chosen = decoded["fields"].values[decoded["member"].values == 1]
    np.testing.assert_array_equal(chosen, fields[1::2])
    assert store.describe_row(3) == f"{store.path} time 2019-03-01T01:00:00, member 1"
    coords["member"] = np.zeros(12, int)
    with pytest.raises(DataError, match="2019-03-01T00:00:00, member 0 appears twice"):
        make_store(coords=coords, name="twice.h5")


def test_a_store_of_version_1_still_opens(make_store):
    store, fields = make_store()
    with h5py.File(store.path, "r+") as file:
        file.attrs["smoe_hpc_store"] = 1
        del file["transform"]
    old = Store(store.path)
    assert old.transforms == ["none", "none"]
    assert old.encoding.is_identity
    np.testing.assert_array_equal(old.read([4]), fields[4:5])


def test_constants_keep_their_type(make_store):
    region, fraction = np.arange(20).reshape(4, 5), np.full((4, 5), 0.1)
    store, _ = make_store(constants={"region": region, "fraction": fraction})
    assert store.constants["region"].dtype == np.int64
    np.testing.assert_array_equal(store.constants["region"], region)
    np.testing.assert_array_equal(store.constants["fraction"], fraction)


def test_a_handle_opened_by_somebody_else_does_not_disturb(make_store):
    store, _ = make_store()
    with h5py.File(store.path, "r"), open_dataset(store.path):
        assert Store(store.path).num_samples == 12


def test_inspect_tells_gaps_and_runs(make_store):
    times = np.delete(hourly(13), 4)
    store, _ = make_store(coords={"time": times}, attributes={"sources": "made up"})
    told = describe_store(store.path)
    assert told["samples"]["count"] == 12
    assert told["samples"]["time"]["step_hours"] == 1
    assert told["samples"]["time"]["first_gaps_end"] == ["2019-03-01T05:00:00"]
    assert "off_step" not in told["samples"]["time"]
    whole, _ = make_store(name="whole.h5")
    assert describe_store(whole.path)["samples"]["time"]["gaps"] == 0
    assert "first_gaps_end" not in describe_store(whole.path)["samples"]["time"]
    late = hourly(12).astype("datetime64[s]")
    late[7:] += np.timedelta64(20, "m")
    off, _ = make_store(coords={"time": late}, name="off.h5")
    message = "times are not on the step of 1 h: 2019-03-01T06:00:00 is followed by 2019-03-01T07:20:00"
    assert describe_store(off.path)["samples"]["time"]["off_step"] == [message]
    assert [str(gap) for gap in verify(off.path).gaps] == [message]
    assert [str(gap) for gap in verify(store.path).gaps] == [
        "gap: 1 sample is missing after 2019-03-01T03:00:00; the next is 2019-03-01T05:00:00"
    ]
    assert told["channels"] == {"t2m": "K", "z500": "K"}
    assert told["storage"]["checksums"] is True
    assert told["attributes"] == {"sources": "made up"}
    runs, _ = make_store(coords={"run": np.repeat([4, 5], 6), "step": np.tile(np.arange(6), 2)}, name="runs.h5")
    assert describe_store(runs.path)["samples"]["run"] == {"first": 4, "last": 5, "different": 2}


@pytest.mark.parametrize("rows", [[-1], [12], [0, 99]])
def test_rows_out_of_range_are_refused(make_store, rows):
    with pytest.raises(DataError, match="its samples are rows 0 to 11"):
        make_store()[0].read(rows)


def test_an_unknown_channel_is_refused_with_the_nearest(make_store):
    with pytest.raises(DataError, match="no channel 't2n'; did you mean 't2m'"):
        make_store()[0].read([0], ["t2n"])
