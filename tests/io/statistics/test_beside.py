"""What is made beside shared data serves everybody who may read the data, and what one user keeps to himself stops nobody."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.io import Grid, Store, StoreWriter
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.channel_statistics import statistics_of
from smoe_hpc.io.statistics.climatology import climatology_of
from smoe_hpc.io.store.index_writing import write_index

from ..conftest import hourly

ROOT = Path(__file__).resolve().parents[3]
MARCH = "2019-03-01/2019-03-02"


@pytest.fixture
def data() -> Iterator[Path]:
    """A folder with a store that everybody may read; not in tmp_path, whose folders are one user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with StoreWriter(folder / "a.h5", Grid.plane(4, 5), ["x"], ["1"], coords={"time": hourly(30)}) as writer:
            writer.write(0, np.random.default_rng(0).random((30, 1, 4, 5)))
        (folder / "a.h5").chmod(0o644)
        folder.chmod(0o755)
        yield folder


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("of_data", "of_folder", "of_file"),
    [(0o2775, 0o775, 0o644), (0o755, 0o755, 0o644), (0o750, 0o750, 0o640), (0o1777, 0o755, 0o644), (0o700, 0o700, 0o600)],
)
def test_what_lies_beside_data_is_as_open_as_their_folder(data: Path, of_data: int, of_folder: int, of_file: int) -> None:
    data.chmod(of_data)
    before = os.umask(0o077)
    try:
        store = Store(data / "a.h5")
        statistics_of(store, Split(MARCH))
        climatology_of(store, Split(MARCH), ["x"])
        write_index(data)
    finally:
        os.umask(before)
    assert rights(data / "index.json") == of_file
    for kind in ("statistics", "climatology"):
        (made,) = (data / kind).iterdir()
        assert (rights(data / kind), rights(made)) == (of_folder, of_file)


COLLEAGUE = """
import os, sys
from smoe_hpc.io import Store, open_store
from smoe_hpc.io.statistics.climatology import climatology_of
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.channel_statistics import statistics_of
os.environ["SMOE_CACHE"] = sys.argv[2]
if os.geteuid() == 0:  # to whom permissions mean nothing
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
store = Store(sys.argv[1] + "/a.h5")
print(repr(statistics_of(store, Split(sys.argv[3])).mean))
climatology_of(store, Split(sys.argv[3]), ["x"])
try: open_store(sys.argv[1])
except ValueError as error: print(error)
"""


@pytest.mark.parametrize("private", ["folders", "files"])
def test_what_a_user_keeps_to_himself_is_computed_again_by_others(data: Path, private: str) -> None:
    mean = statistics_of(Store(data / "a.h5"), Split(MARCH)).mean
    climatology_of(Store(data / "a.h5"), Split(MARCH), ["x"])
    write_index(data)
    made = [data / "index.json"]
    for kind in ("statistics", "climatology"):
        made += [data / kind] if private == "folders" else (data / kind).iterdir()
    for path in made:
        path.chmod(0)
    with tempfile.TemporaryDirectory() as own:
        if os.geteuid() == 0:
            os.chown(own, 65534, 65534)
        started = [sys.executable, "-W", "error", "-c", COLLEAGUE, str(data), own, MARCH]
        done = subprocess.run(started, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        kept = {path.parent.name for path in Path(own).glob("*/*")}
    for path in made:
        path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == repr(mean)
    assert "index.json cannot be read: Permission denied; ask its owner for the right to read it" in second
    assert kept == {"statistics", "climatology"}
