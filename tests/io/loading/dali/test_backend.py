"""DALI's way of reading held against that of threads. Starting a pipeline takes seconds: each test has one or two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, Store
from smoe_hpc.io.loading.dali.backend import join_pieces
from smoe_hpc.io.loading.dali.shared_memory import Room, batches_ahead, needed
from smoe_hpc.io.loading.dali.worker import LentMemory
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.order import Order
from smoe_hpc.io.sampling.windows import Window

from ...store_files import flip_bit
from ..made_samples import assert_is, make_samples, same, wait_until

pytestmark = pytest.mark.dali
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[4]


def folders() -> set[Path]:
    """What this process's loaders and their workers share."""
    return set(Path(tempfile.gettempdir()).glob(f"smoe-dali-{os.getpid()}-*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("kind", "dtype", "order", "options"),
    [
        ("drawn", "float32", Order("blocks", 5), {}),
        ("stacked", "int16", Order(), {"compression": "gzip"}),
        ("each", "float16", Order("blocks", 7), {"constants": False}),
    ],
    ids=["drawn", "stacked", "each"],
)
def test_three_epochs_are_the_same_to_the_bit(make_store, kind, dtype, order, options):
    samples, _ = make_samples(make_store, kind, dtype, order, **options)
    with Loader(samples, workers=2) as threads, Loader(samples, backend="dali", workers=2, prefetch=2) as dali:
        assert dali.backend == "dali"
        for epoch in range(3):
            pairs = zip(
                threads.train(4, epoch, global_batch=6, accumulation=2),
                dali.train(4, epoch, global_batch=6, accumulation=2),
                strict=True,
            )
            assert all(same(one, other) for one, other in pairs)
        workers = dali.processes
        whole = list(dali.evaluate(7))
        assert dali.processes == workers, "one pipeline serves all"
        assert all(same(one, other) for one, other in zip(threads.evaluate(7), whole, strict=True))
        assert_is(whole[-1], samples)
    assert not any(map(alive, workers))


def test_batches_of_less_fields_than_pieces_or_of_none_and_ever_larger_ones(make_store):
    samples, _ = make_samples(make_store, "drawn", "int16")
    few = np.array([[0, 0, 0], [7, -1, -1], [-1, -1, -1], [3, 9, 3]])
    with Loader(samples) as threads, Loader(samples, backend="dali", workers=4, prefetch=1) as dali:
        for items in (few, samples.epoch_ids(0, 0)[:40].reshape(2, 20)):
            for one, other in zip(threads.of(items), dali.of(items), strict=True):
                assert same(one, other)
                assert_is(other, samples)
        for one, other in zip(threads.stored(few), dali.stored(few), strict=True):
            np.testing.assert_array_equal(one.plan.pack(), other.plan.pack())
            assert torch.equal(one.frames, other.frames)
            assert torch.equal(one.target_frames, other.target_frames)
        assert len(other.frames) == 0, "memory goes back before more is taken"


def test_a_worker_uses_memory_again_and_keeps_no_more_than_it_is_asked_for_ahead(make_store):
    table = make_samples(make_store, "one")[0].table
    memory = LentMemory(table, table.input_channels, depth=2)
    first = memory.take(2, 4, 0)
    assert first.shape == (2, 2, *table.store.grid.shape)
    assert not np.shares_memory(first, memory.take(4, 4, 1)), "DALI may not have copied it yet"
    assert np.shares_memory(first, memory.take(4, 4, 2))
    for request in (2, 3):  # another worker's pieces, too
        memory.take(3, 4, request)
    before = np.empty(0, first.dtype)
    for request in range(5, 9):
        again = memory.take(3, 4, request)
        assert not np.shares_memory(again, before)
        assert len(memory) <= 2
        before = again
    assert len(memory.take(9, 9, 20)) == 9


def test_pieces_are_joined_where_they_lie_or_else_copied():
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    fields = np.arange(24.0, dtype=np.float32).reshape(3, 2, 2, 1, 2)
    whole = TensorListCPU(fields)
    joined = join_pieces(whole, 5)
    np.testing.assert_array_equal(joined, fields.reshape(6, 2, 1, 2)[:5])
    assert joined.data_ptr() == torch.from_dlpack(whole[0]).data_ptr()
    ragged = TensorListCPU([TensorCPU(np.ascontiguousarray(fields[0])), TensorCPU(np.ascontiguousarray(fields[1, :1]))])
    np.testing.assert_array_equal(join_pieces(ragged, 3), fields.reshape(6, 2, 1, 2)[:3])


def test_left_and_resumed_at_ten_steps_on_one_and_two_ranks_every_sample_comes_once(make_store):
    samples, _ = make_samples(make_store, "drawn", order=Order("blocks", 4))
    rng = np.random.default_rng(0)
    batch, epochs = 6, 6
    steps = len(samples) // batch
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    stops = [*sorted(rng.choice(steps * epochs, 10, replace=False).tolist()), steps * epochs]
    worlds = [[Loader(samples, backend="dali")]]
    worlds += [[Loader(samples, backend="dali", rank=0, world=2), Loader(samples, rank=1, world=2)]]
    at = 0
    try:
        for number, stop in enumerate(stops):
            while at < stop:
                epoch, step = divmod(at, steps)
                ranks = [loader.train(0, epoch, step, global_batch=batch) for loader in worlds[number % 2]]
                for _ in range(min(stop - at, steps - step)):
                    for part in map(next, ranks):
                        assert_is(part, samples)
                        seen[epoch] += part.ids.tolist()
                    at += 1
                for iterator in ranks:
                    iterator.close()  # with batches read ahead, which the next must not take for its own
    finally:
        for loaders in worlds:
            for loader in loaders:
                loader.close()
    for epoch, items in seen.items():
        assert items == samples.epoch_ids(0, epoch)[: steps * batch].tolist()


def test_errors_of_a_worker_surface_and_the_loader_lives_on(make_store):
    samples, _ = make_samples(make_store, "one", count=60)
    store = samples.store
    flip_bit(store, 30)
    damaged = Samples(Store(store.path), samples.window, None, ["a"], ["b"])
    with Loader(damaged, backend="dali", verify="all", workers=2) as loader:
        for items in ([22, 23, 24, 25], [25, 26, 27, 28]):  # it is in the last piece, and in the first
            with pytest.raises(DataError, match=r"\(row 30\) is damaged"):
                list(loader.of(np.array([items])))
        batches = loader.evaluate(1)
        with pytest.raises(DataError, match=r"store.h5 time 2019-03-02T06:00:00 \(row 30\) is damaged") as caught:
            list(batches)
        assert "Traceback" not in str(caught.value)
        assert next(loader.evaluate(4)).ids.tolist() == [0, 1, 2, 3]
        store.path.touch()
        with pytest.raises(DataError, match="was changed since it was opened"):
            list(loader.evaluate(1))


def test_left_early_or_bereft_of_a_worker_nothing_stays(make_store):
    samples, _ = make_samples(make_store, "one")
    there = folders()
    loader = Loader(samples, backend="dali", workers=2)
    (folder,) = folders() - there
    assert_is(next(loader.evaluate(2)), samples)
    first = loader.processes
    os.kill(first[0], signal.SIGKILL)
    with pytest.raises(DataError, match=r"DALI stopped .*lower loader.workers or .*loader.backend=threads"):
        list(loader.evaluate(1))
    assert not any(map(alive, first))
    batches = loader.train(0, 0, global_batch=4)  # starts others
    assert_is(next(batches), samples)
    workers = loader.processes
    assert all(map(alive, workers))
    batches.close()
    loader.close()
    assert not any(map(alive, workers))
    assert not folder.exists()


def test_workers_outlive_signals_of_the_job_but_not_their_parent(make_store):
    path = make_store(count=40)[0].path
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("reader.py")), str(path), "8"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    expected = Samples(Store(path), Window((-1, 0), 1)).epoch_ids(0, 0)[:18].reshape(9, 2).tolist()
    assert json.loads(process.stdout.readline()) == expected[0]
    workers, folder = json.loads(process.stdout.readline())
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # as Slurm sends them to all processes of a step
        for worker in workers:
            os.kill(worker, name)
    for batch in expected[1:6]:
        process.stdin.write("\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == batch
    assert all(map(alive, workers))
    process.send_signal(signal.SIGTERM)  # nobody is there to tidy up
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert wait_until(lambda: not any(map(alive, workers)))
    assert wait_until(lambda: not Path(folder).exists())


def test_with_little_shared_memory_fewer_batches_are_read_ahead_or_threads_read(make_store):
    store, _ = make_store(count=40, grid=Grid.plane(64, 64))
    script = [sys.executable, str(Path(__file__).with_name("little_shared_memory.py")), str(store.path)]
    own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root and the right to mount")
    done = subprocess.run([*own, *script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    less, refused, threads = (line.split("|") for line in done.stdout.splitlines())
    assert less[:4] == ["4m", "dali", "dali", "6 right: True"]
    assert less[4].count("/dev/shm has 4.2 MB for this process: loader.prefetch=2 serves instead of 4; give it more") == 1
    lack = (
        "/dev/shm has 2.1 MB for this process and DALI needs 3.1 MB of it: give it more (docker run --shm-size=1g, or mount "
        "-o remount,size=1g), lower training.batch, or set loader.backend=threads"
    )
    assert refused == ["2m", "dali", "dali", f"loader.backend=dali: {lack}", "[]"]
    assert threads == ["2m", "auto", "threads", "6 right: True", f"['batches are read by threads: {lack}']"]


def test_shared_memory_is_divided_among_the_processes_of_a_host(tmp_path):
    assert Room(60, 64).each(1) == 60
    assert Room(60, 64).each(4) == 16
    assert Room(10, 64).each(4) == 10
    room = Room.of(tmp_path)
    assert room is not None
    assert 0 < room.free <= room.size
    assert Room.of(tmp_path / "missing") is None
    assert [batches_ahead(10, 4, 2, (1 << 20) + there) for there in (0, 20, 29, 30, 59, 60, 1000)] == [0, 0, 0, 1, 3, 4, 4]
    assert needed(10, 6) == (1 << 20) + 60


@pytest.mark.gpu
def test_fields_go_from_dali_to_torch_on_the_gpu(make_store):
    samples, _ = make_samples(make_store, "drawn", "int16", Order("blocks", 5))
    busy = torch.randn(4096, 4096, device="cuda")
    with Loader(samples, backend="dali", workers=2, device="cuda") as gpu, Loader(samples) as cpu:
        for epoch in range(3):
            kept = []
            for one, other in zip(gpu.train(0, epoch, global_batch=4), cpu.train(0, epoch, global_batch=4), strict=True):
                busy = busy @ busy / 64.0  # the stream lags behind DALI, as in training
                kept.append((one, other))
            assert all(same(one, other) for one, other in kept)
