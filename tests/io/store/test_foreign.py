"""Files that are no stores, of other versions, or that somebody else's script has changed."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Grid, Store, open_dataset

from ..conftest import hourly
from ..store_files import compressed_copy


def change(path: Path, name: str, values: np.ndarray) -> None:
    """Overwrite a variable, as somebody else's script might."""
    with h5py.File(path, "r+") as file:
        file[name][...] = values


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lat", [2, 1, 0, -1], r"latitudes run from 2 to -1 but must strictly ascend \(south to north\); flip the rows"),
        ("lon", [0, 1, 3, 4, 5], "must ascend in even steps"),
        ("time", [0, 3600, 3600, *range(7200, 7200 + 9)], "1970-01-01T01:00:00 appears twice; drop one"),
        ("time", [0, 7200, 3600, *range(7201, 7201 + 9)], "02:00:00 is followed by 1970-01-01T01:00:00; sort them"),
        ("channel", ["a", "a"], "are not all different"),
        ("scale", [0.0, 1.0], "scales must be positive"),
        ("transform", ["none", "cube"], "transform 'cube' is unknown"),
    ],
)
def test_foreign_files_whose_parts_cannot_be_are_refused(make_store, name, values, message):
    store, _ = make_store(grid=Grid("latlon", [50, 51, 52, 53], [0, 1, 2, 3, 4]))
    change(store.path, name, values)
    with pytest.raises(DataError, match=rf"store\.h5: .*{message}"):
        Store(store.path)


def test_foreign_files_that_lack_something_or_hold_other_numbers_are_refused(make_store):
    store, fields = make_store()
    with h5py.File(store.path, "r+") as file:
        del file["fields"]
        file["fields"] = fields.astype(np.float64)
    with pytest.raises(DataError, match="holds float64; a store holds float32, float16, int16: write it again"):
        Store(store.path)
    with h5py.File(store.path, "r+") as file:
        del file["fields"]
        file["fields"] = fields[:5]
    with pytest.raises(DataError, match=r"fields are \(5, 2, 4, 5\) but their names say \(12, 2, 4, 5\)"):
        Store(store.path)
    with h5py.File(store.path, "r+") as file:
        del file["units"]
    with pytest.raises(DataError, match=r"is not a whole store \(.*units.*\); write it again"):
        Store(store.path)


def test_the_digest_sees_everything(make_store):
    digests = set()
    options: list[dict] = [
        {},
        {"name": "again.h5"},
        {"channels": ("t2m", "z501")},
        {"attributes": {"sources": "x"}},
        {"constants": {"region": np.zeros((4, 5))}},
        {"coords": {"time": hourly(12, "2020-01-01")}},
        {"encoding": Encoding.of_bounds("int16", [-8.0] * 2, [8.0] * 2)},
        {"encoding": Encoding.of_bounds("int16", [-9.0] * 2, [8.0] * 2)},
        {"transforms": ["none", "log:10"], "channels": ("t2m", "tp")},
        {"grid": Grid("latlon", [0, 1, 2, 3], [0, 1, 2, 3, 4])},
    ]
    for number, some in enumerate(options):
        store, fields = make_store(**{"name": f"{number}.h5", **some})
        digests.add(store.digest())
    assert len(digests) == len(options) - 1  # the same content has the same digest, whatever its name
    plain, plain_fields = make_store(name="field.h5")
    fields = plain_fields.copy()
    fields[7, 1, 2, 3] = np.nextafter(fields[7, 1, 2, 3], np.float32(9))
    for filters in (None, {}, {"compression": "gzip"}):  # with checksums, and twice without
        path = plain.path if filters is None else compressed_copy(plain, **filters).path
        before = Store(path).digest()
        change(path, "fields", fields)
        assert Store(path).digest() != before
        change(path, "fields", plain_fields)
        assert Store(path).digest() == before


def test_missing_foreign_and_half_written_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; give a store file"):
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


def test_a_store_of_a_later_version_is_refused(make_store):
    store, _ = make_store()
    with h5py.File(store.path, "r+") as file:
        file.attrs["smoe_hpc_store"] = 99
    with pytest.raises(DataError, match="update it"):
        Store(store.path)
