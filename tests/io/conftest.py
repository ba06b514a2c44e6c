import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.io import Grid, Store, StoreWriter

HOUR = np.timedelta64(1, "h")
MakeStore = Callable[..., tuple[Store, np.ndarray]]


def hourly(count: int, start: str = "2019-03-01T00") -> np.ndarray:
    return np.datetime64(start) + np.arange(count) * HOUR


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store of random fields and the fields [T, C, H, W] it holds."""

    def make(
        count: int = 12, channels: tuple[str, ...] = ("t2m", "z500"), grid: Grid | None = None, **options: object
    ) -> tuple[Store, np.ndarray]:
        grid = grid or Grid.plane(4, 5)
        path = tmp_path / str(options.pop("name", "store.h5"))
        coords = options.pop("coords", None) or {"time": hourly(count)}
        fields = np.random.default_rng(0).normal(size=(count, len(channels), *grid.shape)).astype(np.float32)
        with StoreWriter(path, grid, channels, ["K"] * len(channels), coords=coords, **options) as writer:  # type: ignore[arg-type]
            for first in range(0, count, 5):
                writer.write(first, fields[first : first + 5])
        return Store(path), fields

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
