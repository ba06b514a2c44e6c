"""A full disk and a killed writer, for real."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, Store, StoreWriter

from .conftest import hourly

MEGABYTE = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


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
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
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
