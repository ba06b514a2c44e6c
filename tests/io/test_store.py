import pickle
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, Store, StoreWriter, open_dataset
from smoe_hpc.io.inspect import describe_store

from .conftest import hourly


def compressed_copy(store: Store, **filters: object) -> Store:
    """The same store with its fields stored otherwise, as a later writer or h5repack might."""
    path = store.path.with_name("compressed.h5")
    with h5py.File(store.path) as source, h5py.File(path, "w") as copy:
        copy.attrs.update(source.attrs)
        for name in source:
            if name != "fields":
                source.copy(name, copy)
        fields = source["fields"]
        copy.create_dataset("fields", data=fields[:], chunks=fields.chunks, **filters)
    return Store(path)


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
    root = Path(__file__).parents[2]
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


def test_constants_keep_their_type(make_store):
    region, fraction = np.arange(20).reshape(4, 5), np.full((4, 5), 0.1)
    store, _ = make_store(constants={"region": region, "fraction": fraction})
    assert store.constants["region"].dtype == np.int64
    np.testing.assert_array_equal(store.constants["region"], region)
    np.testing.assert_array_equal(store.constants["fraction"], fraction)


def test_opens_as_netcdf4_in_xarray(make_store):
    import xarray

    store, fields = make_store(
        grid=Grid("latlon", [50, 51, 52, 53], [350, 355, 360, 365, 370]), attributes={"sources": "x"}
    )
    with xarray.open_dataset(store.path, engine="h5netcdf") as raw:
        assert raw["fields"].dims == ("time", "channel", "lat", "lon")
        np.testing.assert_array_equal(raw["fields"].values, fields)
        assert (raw["time"].values == hourly(12)).all()
        assert raw.attrs["sources"] == "x"
    with open_dataset(store.path) as decoded:
        chosen = decoded["fields"].sel(channel="z500", lat=51, time="2019-03-01T03")
        np.testing.assert_array_equal(chosen.values.squeeze(), fields[3, 1, 1])
        assert decoded["units"].sel(channel="t2m") == "K"


def test_runs_open_in_xarray_too(make_store):
    coords = {"run": np.repeat([4, 5], 6), "step": np.tile(np.arange(6), 2)}
    store, fields = make_store(coords=coords, constants={"region": np.ones((4, 5), int)})
    with open_dataset(store.path) as decoded:
        assert decoded["fields"].dims == ("sample", "channel", "lat", "lon")
        np.testing.assert_array_equal(decoded["fields"].values[decoded["run"].values == 5], fields[6:])
        assert decoded["constants"].sel(constant="region").values.sum() == 20


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


def test_missing_foreign_and_half_written_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; make it"):
        Store(tmp_path / "nothing.h5")
    with pytest.raises(DataError, match="is a directory"):
        Store(tmp_path)
    (tmp_path / "text.h5").write_text("no HDF5 here" * 100)
    with pytest.raises(DataError, match="is not a store"):
        Store(tmp_path / "text.h5")
    (tmp_path / "empty.h5").touch()
    with pytest.raises(DataError, match="is not a store"):
        Store(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="HDF5 but not a store"):
        Store(tmp_path / "other.h5")
    with pytest.raises(DataError, match="HDF5 but not a store"):
        open_dataset(tmp_path / "other.h5")
    (tmp_path / "store.h5.partial").touch()
    with pytest.raises(DataError, match="what a crash left"):
        Store(tmp_path / "store.h5.partial")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_at_opening(make_store, kept):
    store, _ = make_store(count=50)
    size = store.path.stat().st_size
    with store.path.open("r+b") as file:
        file.truncate(int(size * kept))
    with pytest.raises(DataError, match="truncated"):
        Store(store.path)


def test_a_file_shortened_while_open_is_an_error_not_a_crash(make_store):
    store, _ = make_store(count=50)
    store.read([49])
    last = int(store._offsets.max())
    with store.path.open("r+b") as file:
        file.truncate(last + 10)
    with pytest.raises(DataError, match="truncated"):
        store.read([49])


def test_a_file_replaced_since_it_was_opened_is_refused(make_store):
    store, _ = make_store()
    reader, through_hdf5 = Store(store.path), compressed_copy(store, compression="gzip")
    make_store(count=9, overwrite=True)
    with pytest.raises(DataError, match="was changed since it was opened"):
        reader.read([3])
    through_hdf5.path.touch()
    with pytest.raises(DataError, match="was changed since it was opened"):
        through_hdf5.read([3])


def test_a_store_of_a_later_version_is_refused(make_store):
    store, _ = make_store()
    with h5py.File(store.path, "r+") as file:
        file.attrs["smoe_hpc_store"] = 99
    with pytest.raises(DataError, match="update it"):
        Store(store.path)


def test_a_flipped_bit_is_found_where_hdf5_reads(make_store):
    store, _ = make_store()
    offset = int(store._offsets[3])
    with store.path.open("r+b") as file:
        file.seek(offset + 7)
        byte = file.read(1)[0]
        file.seek(offset + 7)
        file.write(bytes([byte ^ 4]))
    with h5py.File(store.path) as file, pytest.raises(OSError, match="filter"):
        file["fields"][3]


def test_a_store_is_not_overwritten_unasked(make_store, tmp_path):
    make_store()
    with pytest.raises(DataError, match="exists already"):
        make_store()
    make_store(count=3, overwrite=True)
    assert Store(tmp_path / "store.h5").num_samples == 3


def open_writer(path: Path, count: int = 4, **options: object) -> StoreWriter:
    arguments: dict = {"coords": {"time": hourly(count)}, "constants": None, **options}
    return StoreWriter(path, Grid.plane(2, 3), ["t2m", "z500"], ["K", "m2 s-2"], **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path, bad):
    fields = np.zeros((4, 2, 2, 3))
    fields[2, 1, 0, 2] = bad
    with pytest.raises(DataError, match=r"2019-03-01T02:00:00, channel 'z500', lat 0, lon 2"):  # noqa: SIM117
        with open_writer(tmp_path / "a.h5") as writer:
            writer.write(0, fields)
    assert list(tmp_path.iterdir()) == []


def test_large_values_whose_sum_overflows_are_fine(tmp_path):
    with open_writer(tmp_path / "a.h5") as writer:
        writer.write(0, np.full((4, 2, 2, 3), 3e38))
    assert (Store(tmp_path / "a.h5").read([0]) == np.float32(3e38)).all()


def test_samples_never_written_and_failures_inside_leave_nothing(tmp_path):
    with pytest.raises(DataError, match="2 of 4 samples were never written, the first is time 2019-03-01T02"):  # noqa: SIM117
        with open_writer(tmp_path / "a.h5") as writer:
            writer.write(0, np.zeros((2, 2, 2, 3)))
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "a.h5"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("row", "shape"), [(3, (2, 2, 2, 3)), (-1, (1, 2, 2, 3)), (0, (4, 2, 3, 3)), (0, (2, 2, 3))])
def test_slabs_that_do_not_fit_are_refused(tmp_path, row, shape):
    with pytest.raises(DataError, match=r"slab has shape|not all within"), open_writer(tmp_path / "a.h5") as writer:
        writer.write(row, np.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {}}, "needs coordinates"),
        ({"coords": {"tme": np.arange(3)}}, "did you mean 'time'"),
        ({"coords": {"run": np.arange(3), "step": np.arange(4)}}, "of one length"),
        ({"coords": {"time": hourly(4)[[0, 1, 1, 2]]}}, "2019-03-01T01:00:00 appears twice"),
        ({"coords": {"time": hourly(4)[[0, 2, 1, 3]]}}, "2019-03-01T02:00:00 is followed by 2019-03-01T01:00:00"),
        ({"constants": {"region": np.zeros((3, 3))}}, "grid's shape"),
        ({"attributes": {"grid": "x"}}, "belong to the store itself"),
    ],
)
def test_impossible_stores_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_writer(tmp_path / "a.h5", **options)
