"""File systems without locks, as Lustre and NFS are often mounted: one warning, and everything works."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.files.locks import Lock, try_lock
from smoe_hpc.io import Grid, Store, StoreWriter

from . import faulty

SMALL_HEAT = ["--runs", "4", "2", "2", "--grid", "12", "12", "--steps", "10"]
SHORT = ["training.batch=8", "training.max_steps=2", "run.pictures=false"]


def test_everything_from_data_to_scores_works_without_locks(tmp_path: Path):
    environment = faulty.environment(tmp_path, lock=errno.ENOLCK)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        started = [sys.executable, "-m", "smoe_hpc", *arguments]
        done = subprocess.run(started, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    told = [
        command("data", "heat", "data", *SMALL_HEAT).stderr,
        command("train", "heat_conv1", "data.store=data", *SHORT).stderr,
        command("status", "--json", "status.json").stderr,
    ]
    for text in told:
        assert text.count("warning: ") == 1, text
        assert text.count(" has no locks, so nothing keeps two jobs from writing") == 1, text
    assert [run["state"] for run in json.loads((tmp_path / "status.json").read_text())] == ["ended"]
    assert "warning: the file system of runs/heat_conv1/lock has no locks" in told[1]
    (tmp_path / "runs/heat_conv1/finished.json").unlink()  # and a run of a process that is there goes on
    (tmp_path / "runs/heat_conv1/lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    command("status", "--json", "status.json")
    assert [run["state"] for run in json.loads((tmp_path / "status.json").read_text())] == ["running"]


def test_stores_and_what_is_made_once_need_no_locks(tmp_path: Path):
    code = """
import errno, os, sys, warnings
import numpy as np
from pathlib import Path
from smoe_hpc.io import Grid, Store, StoreWriter
from smoe_hpc.io.loading.dali.scratch import make_folder
from smoe_hpc.kernels.build.once import make_once
folder = Path(sys.argv[1])
coords = {"run": np.zeros(2, int), "step": np.arange(2)}
with warnings.catch_warnings(record=True) as told:
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        os.environ["SMOE_TEST_LOCK_ERRNO"] = str(number)
        with StoreWriter(folder / f"{number}.h5", Grid.plane(4, 5), ["x"], ["1"], coords=coords) as writer:
            writer.write(0, np.full((2, 1, 4, 5), 3.0))
        assert (Store(folder / f"{number}.h5").read([1], check=True) == 3).all()
        make_once(folder / f"{number}.once", lambda _, path: path.write_text("made"), lambda: None)
        make_folder("x-")[1]()
assert len(told) == 1, [str(one.message) for one in told]
"""
    environment = faulty.environment(tmp_path, lock=errno.ENOLCK)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.read_text() for path in tmp_path.glob("*.once")} == {"made"}


def test_with_locks_a_store_has_one_writer(tmp_path: Path):
    coords = {"run": np.zeros(2, int), "step": np.arange(2)}

    def writer() -> StoreWriter:
        return StoreWriter(tmp_path / "a.h5", Grid.plane(4, 5), ["x"], ["1"], coords=coords)

    with writer() as first:
        first.write(0, np.full((1, 1, 4, 5), 3.0))
        with pytest.raises(DataError, match=r"a\.h5 is being written by another process; wait for it, or choose another"):
            writer().__enter__()
        first.write(1, np.full((1, 1, 4, 5), 3.0))
    assert (Store(tmp_path / "a.h5").read([0, 1], check=True) == 3).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    with (tmp_path / "a.h5").open("a") as file:  # and lets go of it
        assert try_lock(file, "a.h5") is Lock.TAKEN


def test_what_a_lock_says(tmp_path: Path):
    path = tmp_path / "lock"
    with path.open("w") as one, path.open() as other:
        assert try_lock(other, path, shared=True) is Lock.TAKEN
        assert try_lock(one, path) is Lock.HELD
        fcntl.flock(other, fcntl.LOCK_UN)
        assert try_lock(one, path) is Lock.TAKEN
    with pytest.raises(OSError, match="Bad file descriptor"):
        try_lock(-1 + (1 << 20), path)
