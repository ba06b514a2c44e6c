"""A full disk, a killed writer, bits that flip and files that change underneath a reader, for real."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Grid, Store, StoreWriter, open_store
from smoe_hpc.io.store.interface import is_sampled

from ..conftest import hourly
from ..store_files import flip_bit

MEGABYTE = 1 << 20


def writer_of(path: Path, megabytes: int) -> StoreWriter:
    return StoreWriter(path, Grid.plane(512, 512), ["t2m"], ["K"], coords={"time": hourly(megabytes)})


def test_too_little_space_is_said_before_anything_is_written(small_disk):
    with pytest.raises(DataError, match=r"no space to write .*big.h5: it needs .* MB are free; free some"):
        writer_of(small_disk / "big.h5", 40).__enter__()
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("filled_after", [1, 4, 8])
def test_a_disk_that_fills_up_meanwhile(small_disk, filled_after):
    field = np.random.default_rng(0).random((1, 1, 512, 512))

    def write_all() -> None:
        with writer_of(small_disk / "a.h5", 8) as writer:
            for row in range(8):
                if row == filled_after - 1:
                    fill(small_disk / "somebody_else")
                writer.write(row, field)

    with pytest.raises(DataError, match=r"no space to write .*a.h5: the disk or the quota is full"):
        write_all()
    assert [path.name for path in small_disk.iterdir()] == ["somebody_else"]
    (small_disk / "somebody_else").unlink()
    with writer_of(small_disk / "a.h5", 8) as writer:  # and the same process can go on
        writer.write(0, np.repeat(field, 8, axis=0))
    assert Store(small_disk / "a.h5").num_samples == 8


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    code = f"""
import os, signal, numpy as np
from pathlib import Path
from smoe_hpc.io import Grid, StoreWriter
coords = {{"run": np.zeros(4, int), "step": np.arange(4)}}
with StoreWriter({str(tmp_path / "a.h5")!r}, Grid.plane(64, 64), ["x"], ["1"], coords=coords) as writer:
    writer.write(0, np.zeros((3, 1, 64, 64)))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5.partial"]
    with pytest.raises(DataError, match="does not exist"):
        Store(tmp_path / "a.h5")
    with pytest.raises(DataError, match="what a crash left"):
        Store(tmp_path / "a.h5.partial")
    coords = {"run": np.zeros(4, int), "step": np.arange(4)}
    with StoreWriter(tmp_path / "a.h5", Grid.plane(64, 64), ["x"], ["1"], coords=coords) as writer:
        writer.write(0, np.ones((4, 1, 64, 64)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("dtype", ["float32", "int16"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_flipped_bit_is_found_where_checksums_are_looked_at(make_store, dtype, compression):
    encoding = Encoding.of_bounds(dtype, [-8.0] * 2, [8.0] * 2)
    store, fields = make_store(encoding=encoding, compression=compression)
    flip_bit(store, 3)
    message = (
        r"store\.h5 time 2019-03-01T03:00:00 \(row 3\) is damaged: its bytes do not fit their checksum; copy or write the "
        r"file again \(`smoe-hpc data verify .*store.h5` lists all damage\)"
    )
    for read in (store.read, store.read_stored):
        for channels in (None, ["z500"], ["z500", "t2m"]):
            with pytest.raises(DataError, match=message):
                read([5, 3], channels, check=True)
            with pytest.raises(DataError, match=message):
                read([5, 3], channels, check=True)  # and again: nothing was kept
    np.testing.assert_allclose(store.read([5, 2], check=True), fields[[5, 2]], atol=1e-3)
    with pytest.raises(DataError, match=message):
        Store(store.path, verify="all").read([3])
    if compression is None:
        assert store.read([3]).shape == (1, 2, 4, 5)  # the direct way steps over the checksums, as it says


def test_sampled_verification_looks_at_the_same_rows_always(make_store):
    store, fields = make_store(count=200)
    chosen = np.flatnonzero(is_sampled(np.arange(200)))
    assert 0 < len(chosen) < 20
    for row in (chosen[1], chosen[1] + 1):
        flip_bit(store, int(row))
    reader = open_store(store.path, verify="sampled")
    with pytest.raises(DataError, match=rf"\(row {chosen[1]}\) is damaged"):
        reader.read(np.arange(200))
    rest = np.setdiff1d(np.arange(200), [chosen[1], chosen[1] + 1])[::-1]
    np.testing.assert_array_equal(reader.read(rest), fields[rest])
    assert reader.read([int(chosen[1]) + 1]).shape == (1, 2, 4, 5)
    with pytest.raises(DataError, match="verify='always' is unknown; it is one of off, sampled, all"):
        Store(store.path, verify="always")


def test_a_file_shortened_while_open_is_an_error_not_a_crash(make_store):
    store, _ = make_store(count=50)
    store.read([49])
    with h5py.File(store.path) as file:
        last = file["fields"].id.get_chunk_info_by_coord((49, 0, 0, 0)).byte_offset
    with store.path.open("r+b") as file:
        file.truncate(last + 10)
    with pytest.raises(DataError, match=r"store\.h5 is truncated: .*copy or write it again"):
        store.read([49])


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["replaced", "rewritten", "touched", "removed"])
def test_a_file_changed_while_it_is_in_use_is_refused(make_store, tmp_path, compression, used, how):
    store, fields = make_store(compression=compression)
    if used:
        np.testing.assert_array_equal(store.read([3]), fields[3:4])
    if how == "replaced":
        make_store(count=9, overwrite=True)
    elif how == "rewritten":  # in place: same inode, same size
        with store.path.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
    elif how == "touched":
        store.path.touch()
    else:
        store.path.unlink()
    said = r"was (changed|removed) since it was opened; start again" if how != "removed" else "removed|opened any more"
    with pytest.raises(DataError, match=rf"store\.h5 .*({said})"):
        store.read([3])
    if how in ("replaced", "touched"):
        assert Store(store.path).read([3]).shape == (1, 2, 4, 5)  # who starts again reads what is there now
