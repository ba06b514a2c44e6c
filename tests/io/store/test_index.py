"""index.json: files that are missing, of another size or of other content are named."""

import json

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store, open_store
from smoe_hpc.io.store.index import read_index
from smoe_hpc.io.store.index_writing import write_index

from ..communicators import on_threads
from ..store_files import write


@pytest.fixture
def folder(tmp_path):
    """Three files of a day each, 6 hours apart from the first of March 2019."""
    fields = np.random.default_rng(0).normal(size=(4, 3, 4, 5))
    for day in (1, 2, 3):
        times = np.datetime64(f"2019-03-0{day}T00") + np.arange(4) * np.timedelta64(6, "h")
        write(tmp_path / "data" / f"s_{day}.h5", fields + day, "", coords={"time": times}, attributes={"synthetic": "waves"})
    return tmp_path / "data"


def test_the_index_says_what_the_files_are(folder):
    written = write_index(folder)
    assert read_index(folder) == written
    content = json.loads((folder / "index.json").read_text())
    assert content["channels"] == {"a": "K", "b": "K", "c": "K"}
    assert content["grid"] == "4 x 5 latlon, lat 50..53, lon 0..20, regional"
    assert (content["stored_as"], content["samples"], content["step_hours"], content["synthetic"]) == ("float32", 12, 6.0, True)
    first = content["files"][0]
    store = Store(folder / "s_1.h5")
    assert first["digest"] == store.digest()
    assert (first["name"], first["samples"], first["bytes"]) == ("s_1.h5", 4, store.path.stat().st_size)
    assert (first["first"], first["last"]) == ("time 2019-03-01T00:00:00", "time 2019-03-01T18:00:00")
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "s_1.h5", "s_2.h5", "s_3.h5"]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_communicator_writes_the_same(folder, world):
    alone = write_index(folder)
    assert on_threads(world, lambda communicator: write_index(folder, communicator)) == [alone] * world
    assert read_index(folder) == alone


def test_a_folder_with_an_index_opens_what_it_lists_and_believes_its_digests(folder, monkeypatch):
    write_index(folder)
    digest = open_store(folder).digest()
    (folder / "s_4.h5.partial").write_text("what a crash left")
    assert len(open_store(folder)) == 12
    monkeypatch.setattr("smoe_hpc.io.store.reader.digest_store", None)  # would fail if it were called
    assert open_store(folder).digest() == digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"s_2\.h5 is missing though .*index\.json lists it; restore the file, or, if it is"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"s_2\.h5 has \d+ bytes, but .*index\.json says \d+; re"),
    ],
)
def test_a_file_that_is_not_the_listed_one_is_named(folder, damage, message):
    write_index(folder)
    damage(folder / "s_2.h5")
    with pytest.raises(DataError, match=message + r".*\(`smoe-hpc data verify .*data --index`\)"):
        open_store(folder)


def test_a_file_that_is_not_listed_is_named(folder):
    write_index(folder)
    (folder / "s_4.h5").write_bytes((folder / "s_3.h5").read_bytes())
    with pytest.raises(DataError, match=r"s_4\.h5 is not in .*index\.json; move it away, or .*data verify .* --index`"):
        open_store(folder)
    (folder / "s_4.h5").unlink()
    assert len(open_store(folder)) == 12


def test_a_file_rewritten_with_the_same_size_has_another_digest(folder):
    write_index(folder)
    before = open_store(folder).digest()
    with h5py.File(folder / "s_2.h5", "r+") as file:
        file["fields"][0] = 0
    assert open_store(folder).digest() != before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "files": []}', '{"format": 1, "files": [{"name": "a"}]}'])
def test_what_is_not_an_index_is_refused(folder, text):
    (folder / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json is not an index of stores .*; remove it, or write it anew"):
        open_store(folder)


def test_no_index_is_written_of_files_that_do_not_belong_together(folder):
    write(folder / "s_4.h5", np.ones((1, 3, 4, 5)), "2019-03-04", channels=("a", "c", "b"))
    (folder / "s_9.h5").write_text("no HDF5 here" * 100)
    for message in (r"s_9\.h5 is not a store", r"s_\d\.h5 and .*s_4\.h5 cannot be read as one"):
        errors = on_threads(2, lambda communicator: write_index(folder, communicator))
        assert len({str(error) for error in errors}) == 1
        with pytest.raises(DataError, match=message):
            raise errors[0]
        (folder / "s_9.h5").unlink(missing_ok=True)
    assert not (folder / "index.json").exists()
