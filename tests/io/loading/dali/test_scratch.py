"""Folders of processes that were killed are removed by the next one; those of living ones stay."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smoe_hpc.io.loading.dali.scratch import make_folder

ROOT = Path(__file__).resolve().parents[4]
MAKE = (
    "import sys; from smoe_hpc.io.loading.dali.scratch import make_folder\n"
    "folder, _ = make_folder('x-'); (folder / 'file').touch(); print(folder, flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_folders_go_with_their_processes(tmp_path: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", MAKE], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    folder, remove = make_folder("x-")
    assert theirs.name.startswith(f"x-{other.pid}-")
    assert (theirs / "file").exists()
    remove()
    assert not folder.exists()

    other.send_signal(signal.SIGKILL)
    other.communicate()
    foreign = tmp_path / "x-of somebody"
    foreign.mkdir()
    _, remove = make_folder("x-")
    remove()
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_lock_says_that_a_process_of_another_container_lives(tmp_path: Path) -> None:
    """Its id is nobody's here."""
    folder, remove = make_folder("x-")
    moved = folder.rename(tmp_path / "x-4194999-a")
    _, remove_other = make_folder("x-")
    assert moved.exists()
    remove_other()
    remove()


def test_a_link_that_somebody_left_there_leads_nowhere(tmp_path: Path) -> None:
    """To a pipe, at which opening would wait, or to a folder, which would be emptied."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for number, target in enumerate((own, tmp_path / "pipe")):
        (tmp_path / f"x-419499{number}-a").symlink_to(target)
    _, remove = make_folder("x-")
    remove()
    assert (own / "file").exists()
