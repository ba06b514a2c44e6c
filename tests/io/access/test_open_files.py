"""However many files a folder has, few are open; and what the system does not give is never called damage."""

import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, StoreWriter
from smoe_hpc.io.access.faults import UnreadableError
from smoe_hpc.io.access.open_files import OpenFiles

from ... import faulty

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file a day, 60 of them, each of two fields full of its number."""
    folder = tmp_path_factory.mktemp("daily")
    for day in range(60):
        times = np.datetime64("2019-01-01T00", "h") + 24 * day + np.array([0, 12])
        with StoreWriter(folder / f"d_{day:02d}.h5", Grid.plane(4, 5), ["x"], ["1"], coords={"time": times}) as writer:
            writer.write(0, np.full((2, 1, 4, 5), float(day)))
    return folder


def python(code: str, *arguments: object, environment: dict[str, str] | None = None, **options: object) -> str:
    """What code prints in a process of its own."""
    started = [sys.executable, "-c", code, *map(str, arguments)]
    environ = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(started, env=environ, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


READ_ALL = """
import os, sys, threading
import numpy as np
from smoe_hpc.io import open_store
from smoe_hpc.io.store.index_writing import write_index
from smoe_hpc.io.checks.verify import verify
report = verify(sys.argv[1])
assert report.ok, report.problems()
write_index(sys.argv[1])
store, right = open_store(sys.argv[1]), []
def read(seed):
    order = np.random.default_rng(seed).permutation(np.tile(np.arange(120), 3))
    found = [store.read([row], check=seed == 0)[0, 0, 0, 0] for row in order]
    right.append(bool((np.array(found) == order // 2).all() and (store.read(order)[:, 0, 0, 0] == order // 2).all()))
threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(right, len(os.listdir("/proc/self/fd")) < 40)
store.digest()
store.close()
print(sum(".h5" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")))
"""


def test_sixty_files_are_read_and_verified_with_forty_descriptors(daily: Path) -> None:
    assert python(READ_ALL, daily, preexec_fn=few_descriptors) == "[True, True, True, True] True\n0\n"


NONE_LEFT = """
import os, sys
from smoe_hpc.io import open_store
from smoe_hpc.io.access.faults import UnreadableError
from smoe_hpc.io.checks.verify import verify
store = open_store(sys.argv[1])
store.read([0, 2]), store.read([0, 2], check=True)
taken = []
try:
    while True: taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
print(store.read([118, 119])[:, 0, 0, 0], store.read([4], check=True)[0, 0, 0, 0])  # others are closed for it
try:
    while True: taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
[store.stores[number].close() for number in range(60)]
try:
    while True: taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
try: store.read([0])
except UnreadableError as error: print(error)
report = verify(sys.argv[1] + "/d_00.h5")
print(report.ok, report.problems(), report.unread[0])
"""


def test_no_descriptor_left_is_no_damage(daily: Path) -> None:
    closed, refused, report = python(NONE_LEFT, daily, preexec_fn=few_descriptors).splitlines()
    assert closed == "[59. 59.] 2.0"
    said = "cannot be read: Too many open files; this process may open 40 files: raise that (ulimit -n). The file itself may be"
    assert f"d_00.h5 {said} whole" in refused
    assert report.startswith("False [] ")
    assert said in report


FAILING = """
import errno, os, sys
from smoe_hpc.io import Store
from smoe_hpc.io.checks.verify import verify
store = Store(sys.argv[1])
store.read([0]), store.read([0], check=True)
os.environ["SMOE_TEST_READ_ERRNO"] = str(errno.ESTALE)
for how in ({}, {"check": True}):
    try: store.read([1], **how)
    except Exception as error: print(type(error).__name__, error)
os.environ["SMOE_TEST_READ_ERRNO"] = str(errno.EIO)
report = verify(sys.argv[1])
print(report.ok, report.problems(), report.unread)
del os.environ["SMOE_TEST_READ_ERRNO"]
print(store.read([1], check=True)[0, 0, 0, 0], verify(sys.argv[1]).ok)
"""


def test_a_server_that_fails_is_no_damage(daily: Path, tmp_path: Path) -> None:
    direct, checked, report, after = python(
        FAILING, daily / "d_07.h5", environment=faulty.environment(tmp_path)
    ).splitlines()
    for text in (direct, checked):
        assert text.startswith("UnreadableError ")
        assert "d_07.h5 cannot be read: Stale file handle; check its file system" in text
    assert report.startswith("False [] ")
    assert "d_07.h5 cannot be read: Input/output error" in report
    assert after == "7.0 True"


def test_files_in_use_stay_open_and_the_longest_unused_go_first() -> None:
    closed: list[str] = []
    files: OpenFiles[str] = OpenFiles(2, closed.append, outlives_fork=True)

    def take(name: str):  # type: ignore[no-untyped-def]
        return files.take(name, lambda: name)

    a, b, c = take("a"), take("b"), take("c")
    assert len(files) == 3  # more than are wanted, all in use
    for opened in (b, a, c):
        files.give(opened)
    assert take("a") is a
    files.give(take("d"))
    assert closed == ["b", "c"]  # b before c, which was taken later
    files.drop("a")
    assert closed == ["b", "c"]  # still in use
    again = take("a")
    assert again is not a
    files.give(a)
    assert closed == ["b", "c", "a"]
    files.give(again)
    assert files.close_idle()
    assert (sorted(closed[3:]), files.limit, len(files)) == (["a", "d"], 1, 0)
    assert not files.close_idle()


def test_many_threads_share_few_files() -> None:
    open_now: set[int] = set()
    most, serial, lock = [0], iter(range(10**9)), threading.Lock()

    def open_file() -> int:
        with lock:
            handle = next(serial)
            open_now.add(handle)
            most[0] = max(most[0], len(open_now))
        return handle

    files: OpenFiles[int] = OpenFiles(3, open_now.remove, outlives_fork=True)
    used_closed: list[int] = []

    def work(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 10, 400).tolist():
            opened = files.take(key, open_file)
            if opened.handle not in open_now:
                used_closed.append(opened.handle)
            if key == 0:
                files.drop(key)
            files.give(opened)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not used_closed
    assert most[0] <= 3 + 2 * 8  # idle ones, and what each thread uses and has just opened
    assert files.close_idle()
    assert not open_now


def test_a_child_of_a_fork_reads_with_files_of_its_own(daily: Path) -> None:
    code = """
import os, sys
from smoe_hpc.io import Store
store = Store(sys.argv[1])
store.read([0]), store.read([0], check=True)
if (child := os.fork()) == 0:
    os._exit(int(store.read([1], check=True)[0, 0, 0, 0] + store.read([1])[0, 0, 0, 0]))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), store.read([1], check=True)[0, 0, 0, 0])
"""
    assert python(code, daily / "d_07.h5") == "14 7.0\n"


def test_a_file_without_permission_is_no_damage(daily: Path) -> None:
    code = """
import os, sys
from smoe_hpc.io.checks.verify import verify
if os.geteuid() == 0:  # to whom permissions mean nothing
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
report = verify(sys.argv[1])
print(report.ok, report.samples, report.problems(), report.unread)
"""
    with tempfile.TemporaryDirectory() as name:  # not in tmp_path, whose folders are one user's
        folder = Path(name)
        folder.chmod(0o755)
        for day in (6, 7):
            shutil.copy(daily / f"d_{day:02d}.h5", folder)
        (folder / "d_07.h5").chmod(0)
        found = python(code, folder)
    assert found.startswith("False 2 [] ")
    assert "d_07.h5 cannot be read: Permission denied; ask its owner for the right to read it. The file itself may be" in found


def test_the_error_keeps_its_kind_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnreadableError(Path("a.h5"), errno.EMFILE)))
    assert isinstance(error, UnreadableError)
    assert isinstance(error, DataError)
    assert error.for_want_of_descriptors
