"""What is wrong with data is found, all of it, and named; by any number of ranks alike."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Grid, Store, StoreWriter, open_store
from smoe_hpc.io.checks.inspect import describe_store
from smoe_hpc.io.checks.verify import verify
from smoe_hpc.io.store.index_writing import write_index

from ..communicators import on_threads
from ..conftest import hourly
from ..store_files import flip_bit, write


@pytest.fixture
def folder(tmp_path):
    """Two files of 30 and 40 hours, hours 30 to 47 missing between them."""
    rng = np.random.default_rng(0)
    for number, (count, start) in enumerate(((30, "2019-03-01"), (40, "2019-03-03"))):
        write(tmp_path / "data" / f"s_{number}.h5", rng.normal(size=(count, 3, 4, 5)), start)
    write_index(tmp_path / "data")
    return tmp_path / "data"


def command(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_whole_data_are_whole(folder):
    report = verify(folder)
    assert report.ok
    assert report.problems() == []
    assert (report.files, report.samples) == (2, 70)
    assert report.bytes == sum(path.stat().st_size for path in folder.glob("*.h5"))
    (gap,) = report.gaps
    assert (gap.before, gap.after, gap.missing) == ("2019-03-02T05:00:00", "2019-03-03T00:00:00", 18)
    assert report.quantisation == {}
    shown = command("data", "verify", folder)
    assert shown.exit_code == 0, shown.output
    assert "70 samples, files: 2" in shown.output
    assert "gap: 18 samples are missing after 2019-03-02T05:00:00; the next is 2019-03-03T00:00:00" in shown.output
    assert "every sample is whole" in shown.output


def test_everything_that_is_wrong_is_named(folder, tmp_path):
    for number, row in ((0, 3), (1, 0), (1, 39)):
        flip_bit(Store(folder / f"s_{number}.h5"), row)
    with h5py.File(folder / "s_1.h5", "r+") as file:  # a foreign hand
        file["fields"][7, 1, 2, 3] = np.nan
        file["fields"][7, 1, 3, 3] = np.inf
        file["fields"][8, 2, 0, 0] = -np.inf
    report = verify(folder)
    assert not report.ok
    assert [(one.file[-6:], one.row) for one in report.damaged] == [("s_0.h5", 3), ("s_1.h5", 0), ("s_1.h5", 39)]
    assert report.damaged[2].sample == "time 2019-03-04T15:00:00"
    assert [(one.row, one.channel, one.lat, one.lon, one.count) for one in report.not_finite] == [
        (7, "b", 52, 15, 2),
        (8, "c", 50, 0, 1),
    ]
    assert len(report.index) == 1
    assert "s_1.h5 holds something else than when index.json was written" in report.index[0]
    problems = "\n".join(report.problems())
    assert "s_0.h5 time 2019-03-01T03:00:00 (row 3) is damaged: its bytes do not fit their checksum" in problems
    assert "s_1.h5 time 2019-03-03T07:00:00 (row 7), channel 'b': 2 values are not finite" in problems
    assert "the first at lat 52, lon 15; fill them at the source" in problems
    for world in (2, 3):
        assert on_threads(world, lambda communicator: verify(folder, communicator)) == [report] * world
    shown = command("data", "verify", folder, "--json", tmp_path / "report.json")
    assert shown.exit_code == 1
    assert shown.output.count("BAD: ") == 6
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["ok"] is False
    assert told["damaged"][0]["sample"] == "time 2019-03-01T03:00:00"
    assert command("data", "verify", folder, "--index").exit_code == 1, "no index of damaged data"


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_flipped_bit_in_compressed_data_is_found(make_store, compression):
    pytest.importorskip("hdf5plugin")
    encoding = Encoding.of_bounds("int16", [-8.0] * 2, [8.0] * 2)
    store, _ = make_store(compression=compression, encoding=encoding)
    assert verify(store.path).ok
    flip_bit(store, 5)
    report = verify(store.path)
    assert [one.row for one in report.damaged] == [5]


def test_files_that_cannot_be_opened_or_do_not_fit_are_told(folder):
    with (folder / "s_1.h5").open("r+b") as file:
        file.truncate(9000)
    write(folder / "s_2.h5", np.ones((2, 3, 4, 5)), "2019-03-02T04", channels=("a", "c", "b"))
    report = verify(folder)
    assert not report.ok
    assert any("s_1.h5 is truncated" in text for text in report.unusable)
    assert any("s_2.h5 cannot be read as one: their channels are in another order" in text for text in report.unusable)
    assert any("s_1.h5 has 9000 bytes, but" in text for text in report.index)
    assert any("s_2.h5 is not in" in text and "move it away" in text for text in report.index)
    (folder / "s_2.h5").unlink()
    write(folder / "s_2.h5", np.ones((2, 3, 4, 5)), "2019-03-02T05")
    message = "both hold time 2019-03-02T05:00:00"
    assert any(message in text for text in verify(folder).unusable)


def test_an_index_is_written_anew_when_asked(folder):
    shutil.copy(folder / "s_1.h5", folder / "s_2.h5")
    with h5py.File(folder / "s_2.h5", "r+") as file:
        file["time"][...] += 5 * 86400
    assert command("data", "verify", folder).exit_code == 1
    with pytest.raises(DataError, match=r"s_2\.h5 is not in .*index\.json"):
        open_store(folder)
    shown = command("data", "verify", folder, "--index")
    assert shown.exit_code == 0, shown.output
    assert "index written" in shown.output
    assert len(open_store(folder)) == 110
    assert command("data", "verify", folder).exit_code == 0
    refused = command("data", "verify", folder / "s_1.h5", "--index")
    assert refused.exit_code == 2
    assert "is not a folder; an index belongs to a folder" in refused.output


def test_files_without_checksums_are_told(make_store):
    store, fields = make_store()
    with h5py.File(store.path, "r+") as file:
        del file["fields"]
        file.create_dataset("fields", data=fields, chunks=(1, *fields.shape[1:]))
    report = verify(store.path)
    assert report.ok
    assert report.unchecked == (str(store.path),)
    assert "has no checksums: damage cannot be seen there" in command("data", "verify", store.path).output


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist; give a store file"):
        verify(tmp_path / "none.h5")
    assert command("data", "verify", tmp_path / "none.h5").exit_code == 2


@pytest.mark.parametrize("dtype", ["float16", "int16"])
def test_the_rounding_error_is_what_rounding_does(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shape = (40, 16, 32)
    physical = np.stack(
        [2e5 + 3e3 * rng.normal(size=shape), rng.uniform(-60, 60, shape), 0.001 * rng.gamma(2.0, 2.0, shape)], axis=1
    )
    grid = Grid("latlon", np.linspace(-75, 75, 16), np.arange(32) * 11.25)
    path = tmp_path / "a.h5"
    with StoreWriter(
        path, grid, ["z50", "u250", "tp"], ["m2 s-2", "m s-1", "m"], coords={"time": hourly(40)}, dtype=dtype
    ) as writer:
        writer.write(0, physical)
    store = Store(path)
    in_stored_space = physical.copy()
    in_stored_space[:, 2] = np.log1p(physical[:, 2] / 0.001)
    error = store.read(range(40)).astype(np.float64) - in_stored_space
    back = 0.001 * np.expm1(store.read(range(40), ["tp"]).astype(np.float64)[:, 0]) - physical[:, 2]
    told = verify(path).quantisation
    for place, channel in enumerate(store.channels):
        share = np.sqrt((error[:, place] ** 2).mean()) / in_stored_space[:, place].std()
        assert told[channel].share_of_std == pytest.approx(share, rel=0.05)
        assert told[channel].share_of_std < 0.01
    assert told["z50"].rms == pytest.approx(np.sqrt((error[:, 0] ** 2).mean()), rel=0.05)
    assert told["tp"].rms == pytest.approx(np.sqrt((back**2).mean()), rel=0.05)
    assert (told["z50"].units, told["tp"].units) == ("m2 s-2", "m")
    shares = [{name: one.share_of_std for name, one in report.quantisation.items()} for report in
              on_threads(3, lambda communicator: verify(path, communicator))]  # fmt: skip
    for found in shares:
        assert found == pytest.approx({name: one.share_of_std for name, one in told.items()}, rel=1e-9)
    shown = command("data", "verify", path)
    assert "error of rounding" in shown.output
    assert "of the std" in shown.output


def test_synthetic_data_are_called_so_loudly(tmp_path):
    for number, attributes in enumerate(({"synthetic": "random waves"}, {"sources": "synthetic: heat"})):
        path = tmp_path / f"{number}.h5"
        write(path, np.ones((2, 3, 4, 5)), "2019-03-01", attributes=attributes)
        assert verify(path).synthetic
        assert command("data", "verify", path).stdout.startswith("SYNTHETIC: these fields were made up")
        shown = command("data", "inspect", path).output.splitlines()
        assert shown[1] == "synthetic: YES: these fields were made up, they are not observations"
    assert "synthetic" not in describe_store(write(tmp_path / "real.h5", np.ones((2, 3, 4, 5)), "2019-03-01").path)


def test_inspect_tells_of_folders_gaps_and_encodings(folder, tmp_path):
    told = describe_store(folder)
    assert told["files"] == ["s_0.h5", "s_1.h5"]
    assert told["index"] == "index.json, sizes as it says"
    assert told["samples"]["count"] == 70
    assert (told["samples"]["time"]["gaps"], told["samples"]["time"]["first_gaps_end"]) == (1, ["2019-03-03T00:00:00"])
    os.remove(folder / "index.json")
    assert describe_store(folder)["index"] == "none"
    pytest.importorskip("hdf5plugin")
    path = tmp_path / "packed.h5"
    grid = Grid("latlon", [-45, 45], [0, 90, 180, 270])
    with StoreWriter(
        path, grid, ["t2m", "tp"], ["K", "m"], coords={"time": hourly(1)}, dtype="int16", compression="zstd"
    ) as writer:
        writer.write(0, np.stack([np.full((2, 4), 280.0), np.zeros((2, 4))])[None])
    packed = describe_store(path)
    assert packed["storage"] == {
        "type": "int16",
        "chunk": [1, 2, 2, 4],
        "compression": "zstd",
        "checksums": True,
        "read": "through HDF5",
    }
    assert packed["transforms"] == {"tp": "log:0.001"}
    assert packed["ranges"]["t2m"].startswith("164.997 to 345.003 in steps of 0.00275")
    assert "files" not in packed
