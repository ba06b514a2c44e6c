"""Folders of stores from elsewhere: FIFOs, devices, sockets, links and JSON never hang, lead out or end in a traceback."""

import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import NotPlainError, open_regular, parse_json, read_bytes, require_regular
from smoe_hpc.io import Grid, Store, StoreWriter, open_store
from smoe_hpc.io.checks.inspect import describe_store
from smoe_hpc.io.checks.verify import verify
from smoe_hpc.io.convert import convert
from smoe_hpc.io.convert.grib import convert_grib
from smoe_hpc.io.loading.dali.scratch import make_folder
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.statistics.climatology import Climatology
from smoe_hpc.io.store.index import INDEX, read_index
from smoe_hpc.io.store.index_writing import write_index

from ..conftest import hourly

PATIENCE = 60.0  # seconds; what does not hang takes milliseconds


def in_time(action: Callable[[], object]) -> object:
    """What an action gives, or raises; a failure where it hangs."""
    came: list[object] = []

    def act() -> None:
        try:
            came.append(action())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert came, "it hangs"
    if isinstance(came[0], Exception):
        raise came[0]
    return came[0]


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one, tempfile.TemporaryDirectory() as short:  # its whole path may be too long
        one.bind(f"{short}/socket")
        os.rename(f"{short}/socket", path)


def put_link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def put_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_loop(path: Path) -> None:
    path.symlink_to(path.name)


PUT = [put_fifo, put_socket, put_link_to_fifo, put_link_to_device, put_loop]
NOT_A_FILE = "not a regular file|does not exist|symbolic links|cannot be opened"


@pytest.fixture(params=PUT, ids=lambda put: put.__name__)
def put(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    chosen: Callable[[Path], None] = request.param
    return chosen


@pytest.mark.parametrize("action", [Store, open_store, verify, describe_store])
def test_no_store_but_something_else(put, action, tmp_path):
    put(tmp_path / "x.h5")
    if action is verify and put is not put_loop:
        report = in_time(lambda: verify(tmp_path / "x.h5"))
        assert len(report.unusable) == 1
        assert "not a regular file" in report.unusable[0]
        return
    with pytest.raises(DataError, match=NOT_A_FILE):
        in_time(lambda: action(tmp_path / "x.h5"))


def test_something_else_among_the_stores_of_a_folder(put, make_store, tmp_path):
    make_store(name="a.h5")
    put(tmp_path / "b.h5")
    with pytest.raises(DataError, match=NOT_A_FILE):
        in_time(lambda: open_store(tmp_path))
    report = in_time(lambda: verify(tmp_path))
    assert (report.files, report.samples, len(report.unusable)) == (2, 12, 1)
    with pytest.raises(DataError, match=NOT_A_FILE):
        in_time(lambda: write_index(tmp_path))


def test_something_else_that_an_index_lists(put, make_store, tmp_path):
    make_store(name="a.h5")
    write_index(tmp_path)
    size = (tmp_path / "a.h5").stat().st_size
    (tmp_path / "a.h5").unlink()
    put(tmp_path / "a.h5")
    with pytest.raises(DataError, match=rf"a\.h5 (has \d+ bytes, but|is a link in circles .*) .*{INDEX}"):
        in_time(lambda: open_store(tmp_path))
    content = json.loads((tmp_path / INDEX).read_text())
    content["files"][0]["bytes"] = size = 0
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"a\.h5 is a link in circles|{NOT_A_FILE}"):
        in_time(lambda: open_store(tmp_path))
    assert size == 0
    assert not in_time(lambda: verify(tmp_path)).ok


def test_something_else_for_an_index(put, make_store, tmp_path):
    make_store(name="a.h5")
    put(tmp_path / INDEX)
    for action in (read_index, open_store, describe_store):
        with pytest.raises(DataError, match=r"index\.json is not an index of stores \(.*\); remove it, or write it anew"):
            in_time(lambda action=action: action(tmp_path))
    report = in_time(lambda: verify(tmp_path))
    assert len(report.index) == 1
    in_time(lambda: write_index(tmp_path))  # puts a file in its place, and leaves what a link led to
    assert read_index(tmp_path).files[0].name == "a.h5"
    assert not (tmp_path / INDEX).is_symlink()


def test_something_else_for_kept_results(put, tmp_path):
    put(tmp_path / "kept")
    with pytest.raises(DataError, match="statistics"):
        in_time(lambda: Statistics.load(tmp_path / "kept"))
    with pytest.raises(DataError, match="climatology"):
        in_time(lambda: Climatology.load(tmp_path / "kept"))


def test_something_else_to_convert(put, tmp_path):
    put(tmp_path / "x.grib")
    for action in (convert, convert_grib):
        with pytest.raises(DataError, match=NOT_A_FILE):
            in_time(lambda action=action: action(tmp_path / "x.grib", tmp_path / "x.h5"))


def test_something_else_where_a_store_is_written(put, tmp_path):
    put(tmp_path / "x.h5.partial")
    writer = StoreWriter(tmp_path / "x.h5", Grid.plane(1, 1), ["t"], ["K"], coords={"time": hourly(1)})
    with pytest.raises(DataError, match=r"x\.h5\.partial (is a link, and writing would change|is .* not a regular file)"):
        in_time(writer.__enter__)


def test_a_link_never_leads_a_writer_to_another_file(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "x.h5.partial").symlink_to("thesis")
    writer = StoreWriter(tmp_path / "x.h5", Grid.plane(1, 1), ["t"], ["K"], coords={"time": hourly(1)})
    with pytest.raises(DataError, match="would change the file that it leads to"):
        writer.__enter__()
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_links_to_files_on_other_storage_are_followed(make_store, tmp_path):
    store, fields = make_store(name="a.h5")
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "a.h5").symlink_to(store.path)
    write_index(folder)
    (tmp_path / "data").symlink_to(folder)
    np.testing.assert_array_equal(open_store(tmp_path / "data").read(range(12)), fields)
    assert verify(tmp_path / "data").ok


NAMES = ["../a.h5", "/etc/passwd", "sub/a.h5", "..", ".", "", "a.txt", "a\n.h5", "a\0.h5", "\x1b[2J.h5"]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_lists_plain_names_only(name, make_store, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    make_store(name="a.h5")  # what ../a.h5 would lead to
    make_store(name="inner/a.h5")
    write_index(inner)
    content = json.loads((inner / INDEX).read_text())
    content["files"][0]["name"] = name
    (inner / INDEX).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is not an index of stores \(it lists .*, which is not the plain name of a store"):
        open_store(inner)
    assert any("plain name" in one for one in verify(inner).index)


ENTRY = {"name": "a.h5", "bytes": 1, "changed_ns": 1, "digest": "d", "samples": 1, "first": "f", "last": "l"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"files": ' * 200_000, "nested too deeply"),
        (b"[1, 2]", "list instead of an object"),
        (b"3", "int instead of an object"),
        (b"null", "NoneType instead of an object"),
        (b'{"format": 1, "files": \xff}', "not JSON: 'utf-8' codec"),
        (b'{"format": NaN, "files": []}', "holds NaN, where a finite number is due"),
        (b'{"format": 1, "files": [1]}', "must be a mapping"),
        (b'{"format": 1, "files": 7}', "not iterable"),
        (b'{"format": 1, "files": []}', "lists no file"),
        (b'{"format": 1e999, "files": []}', "format"),
        (b'{"format": ' + b"1" * 5000 + b"}", "4300 digits"),
        (json.dumps({"format": 1, "files": [ENTRY, ENTRY]}).encode(), "one twice"),
        (json.dumps({"format": 1, "files": [{**ENTRY, "bytes": "1"}]}).encode(), "values of other types"),
        (json.dumps({"format": 1, "files": [{**ENTRY, "bytes": True}]}).encode(), "values of other types"),
        (json.dumps({"format": 1, "files": [{**ENTRY, "name": ["a.h5"]}]}).encode(), "values of other types"),
        (json.dumps({"format": 1, "files": [{**ENTRY, "more": 1}]}).encode(), "more"),
    ],
    ids=lambda value: str(value[:30]) if isinstance(value, bytes) else None,
)
def test_an_index_that_is_none(text, words, make_store, tmp_path):
    make_store(name="a.h5")
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(DataError, match=rf"index\.json is not an index of stores \(.*{words}.*\); remove it"):
        open_store(tmp_path)
    assert len(verify(tmp_path).index) == 1


def test_an_index_as_large_as_a_disk_is_not_read(make_store, tmp_path):
    make_store(name="a.h5")
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 40)  # holds nothing
    with pytest.raises(DataError, match="more than 64 MiB"):
        in_time(lambda: read_index(tmp_path))


@pytest.mark.parametrize("text", [b"[" * 200_000, b"[]", b"\xff", b'{"channels": 3, "sha256": ""}', b'{"sha256": NaN}', b"{}"])
def test_statistics_that_are_none(text, tmp_path):
    (tmp_path / "s.json").write_bytes(text)
    with pytest.raises(DataError, match=r"s\.json .*(remove the file, and )?compute them again"):
        Statistics.load(tmp_path / "s.json")


def test_a_climatology_that_is_none(tmp_path):
    path = tmp_path / "c.npz"
    good = {"channels": np.array(["t"]), "mean": np.zeros((1, 2, 3)), "weekly": np.zeros((52, 1, 2, 3))}
    np.savez(path, **good)
    assert Climatology.load(path).channels == ("t",)
    bad = [
        ("pickle", {**good, "mean": np.array([{}], dtype=object)}),
        ("other types", {**good, "mean": good["mean"].astype(np.float32)}),
        ("other types", {**good, "channels": np.zeros(1)}),
        ("do not fit together", {**good, "weekly": np.zeros((51, 1, 2, 3))}),
        ("do not fit together", {**good, "mean": np.zeros((2, 2, 3))}),
        ("not finite", {**good, "mean": good["mean"] + np.nan}),
        ("weekly", {"channels": good["channels"], "mean": good["mean"]}),
    ]
    for words, content in bad:
        np.savez(path, **content)
        with pytest.raises(DataError, match=rf"cannot read climatology .*{words}.*; compute it again"):
            Climatology.load(path)
    np.savez_compressed(path, **good)
    with pytest.raises(DataError, match="compressed"):
        Climatology.load(path)
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY" + b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot read climatology"):
            Climatology.load(path)


def test_plain_files_and_texts(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}')
    require_regular(tmp_path / "a")
    os.close(open_regular(tmp_path / "a"))
    assert parse_json(read_bytes(tmp_path / "a", 8)) == {"a": 1}
    with pytest.raises(NotPlainError, match="more than 0 MiB"):
        read_bytes(tmp_path / "a", 7)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "b")
    with pytest.raises(DataError, match=r"b cannot be opened: No such file or directory; restore the file, or remove it"):
        require_regular(tmp_path / "b")
    with pytest.raises(DataError, match="is a directory, not a regular file; remove it, or put the file itself there"):
        require_regular(tmp_path)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_lies_among_temporary_files_is_not_followed(temporary):
    mine = temporary / "mine"
    mine.mkdir()
    (mine / "kept").touch()
    (temporary / "smoe-x-999999999-link").symlink_to(mine)
    os.mkfifo(temporary / "smoe-x-999999998-fifo")
    folder, remove = in_time(lambda: make_folder("smoe-x-"))
    assert (mine / "kept").exists()
    assert folder.is_dir()
    remove()
