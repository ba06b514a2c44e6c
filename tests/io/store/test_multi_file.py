"""Several files read as one, equal to the fields they were cut from; and files that do not belong together."""

import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Grid, Series, Store, open_store
from smoe_hpc.io.store.index_writing import write_index
from smoe_hpc.io.store.layout import is_synthetic

from ..store_files import CHANNELS, write

COUNTS = (5, 1, 7)


@pytest.fixture(params=["float32", "int16"])
def folder(tmp_path, request):
    """Three files of 5, 1 and 7 hours with holes between, and the 13 fields as they come back."""
    fields = np.random.default_rng(0).normal(size=(13, 3, 4, 5)).astype(np.float32)
    encoding = Encoding.of_bounds(request.param, [-8.0] * 3, [8.0] * 3)
    first = 0
    for number, count in enumerate(COUNTS):
        attributes = {"sources": "x", "part": number}
        write(tmp_path / f"s_{number}.h5", fields[first : first + count], f"2019-03-0{number + 1}T00", encoding=encoding,
              attributes=attributes)  # fmt: skip
        first += count
    return tmp_path, encoding.decode(encoding.encode(fields))


def test_a_series_is_its_files_one_after_the_other(folder):
    path, fields = folder
    with open_store(path) as series:
        assert isinstance(series, Series)
        assert (len(series), series.num_samples, series.channels, series.direct) == (13, 13, list(CHANNELS), True)
        assert series.folder == path
        assert series.attributes == {"sources": "x"}  # only what all files say
        assert (np.diff(series.coords["time"]).astype(int) > 0).all()
        assert list(series.constants) == ["land"]
        rng = np.random.default_rng(1)
        for channels in (None, ["c"], ["b", "a"]):
            places = [0, 1, 2] if channels is None else ["abc".index(name) for name in channels]
            for rows in (np.arange(13), rng.integers(0, 13, 40), np.array([4, 5, 6, 5]), np.array([], int)):
                for check in (False, True):
                    found = series.read(rows, channels, check=check)
                    np.testing.assert_array_equal(found, fields[rows][:, places])
                    out = np.empty(found.shape, series.encoding.stored_type)
                    assert series.read_stored(rows, channels, out, check) is out
                    np.testing.assert_array_equal(series.encoding.select(places).decode(out), found)
        assert series.describe_row(6) == f"{path / 's_2.h5'} time 2019-03-03T00:00:00"
        assert series.describe_row(4) == f"{path / 's_0.h5'} time 2019-03-01T04:00:00"
        with pytest.raises(DataError, match="has no row 13; its samples are rows 0 to 12"):
            series.read([13])
        with pytest.raises(DataError, match="no channel 'd'"):
            series.read([1], ["d"])


def test_a_file_a_folder_and_a_pattern_are_opened_alike(folder, tmp_path):
    path, fields = folder
    assert isinstance(open_store(path / "s_0.h5"), Store)
    np.testing.assert_array_equal(open_store(path / "s_[12].h5").read(range(8)), fields[5:])
    assert isinstance(open_store(path / "s_[1].h5"), Store)  # one file is that file
    (path / "s_9.h5.partial").write_text("what a crash left")
    (path / "notes.txt").write_text("not a store")
    assert len(open_store(path)) == 13
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no store \(\*\.h5\); give a folder"):
        open_store(tmp_path / "empty")
    with pytest.raises(DataError, match="no file fits the pattern"):
        open_store(path / "t_*.h5")
    with pytest.raises(DataError, match="does not exist"):
        open_store(path / "t_0.h5")


def test_files_are_ordered_by_time_whatever_their_names(tmp_path):
    fields = np.random.default_rng(0).normal(size=(4, 3, 4, 5)).astype(np.float32)
    later, earlier = write(tmp_path / "a.h5", fields[2:], "2019-03-02"), write(tmp_path / "b.h5", fields[:2], "2019-03-01")
    np.testing.assert_array_equal(open_store(tmp_path).read(range(4)), fields)
    with pytest.raises(DataError, match=r"a\.h5 and .*b\.h5 are out of order: time 2019-03-01T00:00:00 of the second"):
        Series([later, earlier], tmp_path)


def test_a_pickled_series_reads_in_another_process(folder):
    path, fields = folder
    series = open_store(path)
    series.read([0, 12])
    code = "import pickle,sys; s=pickle.load(sys.stdin.buffer); print(float(s.read([5, 12]).astype('f8').sum()))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(series), capture_output=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert float(done.stdout) == float(fields[[5, 12]].astype(np.float64).sum())


def test_the_digest_is_of_all_files(folder):
    path, _ = folder
    digest = open_store(path).digest()
    assert digest == open_store(path / "s_*.h5").digest()
    assert digest != open_store(path / "s_[01].h5").digest()
    write_index(path)
    assert open_store(path).digest() == digest
    with h5py.File(path / "s_2.h5", "r+") as file:
        file["fields"][6] = 0
    assert open_store(path).digest() != digest  # a changed file's entry in the index is not believed


def test_damage_and_change_name_the_file(folder):
    path, _ = folder
    series = open_store(path, verify="all")
    series.read([12])
    (path / "s_2.h5").touch()
    with pytest.raises(DataError, match=r"s_2\.h5 was changed since it was opened"):
        series.read([12])
    assert series.read([0]).shape == (1, 3, 4, 5)


OTHER = {"encoding": Encoding.of_bounds("int16", [-8.0] * 3, [9.0] * 3)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": Grid("latlon", [50, 51, 52, 53], [10, 15, 20, 25, 30])}, "the columns are shifted by 10 degrees"),
        ({"grid": Grid("latlon", [-53, -52, -51, -50], [0, 5, 10, 15, 20])}, "the points differ"),
        ({"channels": ("a", "c", "b")}, r"channels are in another order \(channel 1 is 'b' and 'c'\)"),
        ({"channels": ("a", "b", "d")}, r"channels are others \(c, d in only one of them\)"),
        ({"units": ["K", "K", "m"]}, "channel 'c' has units 'K' and 'm'"),
        ({"transforms": ["none", "none", "log:0.1"]}, "channel 'c' has transforms 'none' and 'log:0.1'"),
        (OTHER, "they are stored as float32 and int16, or with other scales"),
        ({"constants": {"land": np.zeros((4, 5))}}, r"their constants differ \(land\)"),
        ({"constants": {}}, r"their constants differ \(land\)"),
        ({"attributes": {"synthetic": "made up"}}, "one is synthetic and one is not"),
        ({"coords": {"run": np.zeros(3, int), "step": np.arange(3)}}, "samples are named by time and by run, step"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_naming_both(tmp_path, changed, message):
    fields = np.ones((3, 3, 4, 5))
    write(tmp_path / "a.h5", fields, "2019-03-01")
    write(tmp_path / "b.h5", fields, "2019-03-02", **changed)
    with pytest.raises(DataError, match=rf"[ab]\.h5 and .*[ab]\.h5 cannot be read as one: .*{message}") as caught:
        open_store(tmp_path / "?.h5") if "coords" not in changed else Series(
            [Store(tmp_path / "a.h5"), Store(tmp_path / "b.h5")], tmp_path
        )
    assert "\n" not in str(caught.value)


def test_an_hour_in_two_files_is_refused_naming_both_and_the_hour(tmp_path):
    fields = np.ones((3, 3, 4, 5))
    write(tmp_path / "a.h5", fields, "2019-03-01T00")
    write(tmp_path / "b.h5", fields, "2019-03-01T02")
    message = r"a\.h5 and .*b\.h5 both hold time 2019-03-01T02:00:00 \(1 such samples in all\); remove one file"
    with pytest.raises(DataError, match=message):
        open_store(tmp_path)
    write(tmp_path / "b.h5", fields, "2019-03-01T00:30", overwrite=True)
    with pytest.raises(DataError, match=r"a\.h5 and .*b\.h5 are out of order: time 2019-03-01T00:30:00 of the second"):
        open_store(tmp_path)


def test_a_foreign_file_with_flipped_latitudes_among_the_others_is_refused(tmp_path):
    fields = np.ones((3, 3, 4, 5))
    write(tmp_path / "a.h5", fields, "2019-03-01")
    write(tmp_path / "b.h5", fields, "2019-03-02")
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["lat"][...] = file["lat"][:][::-1]
    with pytest.raises(DataError, match=r"b\.h5: latitudes run from 53 to 50 but must strictly ascend .*flip the rows"):
        open_store(tmp_path)


def test_synthetic_files_make_a_synthetic_series_however_each_says_it(tmp_path):
    for day, words in ((1, {"synthetic": "waves"}), (2, {"sources": "synthetic: other waves"})):
        write(tmp_path / f"{day}.h5", np.ones((3, 3, 4, 5)), f"2019-03-0{day}", attributes=words)
    assert is_synthetic(open_store(tmp_path).attributes)


def test_runs_go_on_from_file_to_file(tmp_path):
    fields = np.random.default_rng(0).normal(size=(6, 3, 4, 5)).astype(np.float32)
    for number in (0, 1):
        coords = {"run": np.full(3, number), "step": np.arange(3)}
        write(tmp_path / f"{number}.h5", fields[3 * number : 3 * number + 3], "2019-03-01", coords=coords)
    series = open_store(tmp_path)
    assert series.coords["run"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(series.read(range(6)), fields)
    assert series.describe_row(4).endswith("1.h5 run 1, step 1")
