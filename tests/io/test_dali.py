"""DALI's way of reading held against the plain one. Starting a pipeline takes seconds: each test has one or two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store
from smoe_hpc.io.fronts.dali import DaliFront, _joined
from smoe_hpc.io.fronts.dali_worker import _Memory
from smoe_hpc.io.loader import Loader
from smoe_hpc.io.order import Order
from smoe_hpc.io.pipeline import Samples
from smoe_hpc.io.samples import Window

from .loading import assert_is, make_samples, same, wait_until

pytestmark = pytest.mark.dali
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def processes_of(loader: Loader) -> list[int]:
    return loader._reads.processes  # type: ignore[union-attr, no-any-return]


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
    with Loader(samples, workers=2) as plain, Loader(samples, front="dali", workers=2, prefetch=2) as dali:
        assert dali.front == "dali"
        for epoch in range(3):
            pairs = zip(
                plain.train(4, epoch, global_batch=6, accumulation=2),
                dali.train(4, epoch, global_batch=6, accumulation=2),
                strict=True,
            )
            assert all(same(one, other) for one, other in pairs)
        workers = processes_of(dali)
        whole = list(dali.evaluate(7))
        assert processes_of(dali) == workers, "one pipeline serves all"
        assert all(same(one, other) for one, other in zip(plain.evaluate(7), whole, strict=True))
        assert_is(whole[-1], samples)
    assert not any(map(alive, workers))


def test_batches_of_less_fields_than_pieces_or_of_none_and_ever_larger_ones(make_store):
    samples, _ = make_samples(make_store, "drawn", "int16")
    few = np.array([[0, 0, 0], [7, -1, -1], [-1, -1, -1], [3, 9, 3]])
    with Loader(samples) as plain, Loader(samples, front="dali", workers=4, prefetch=1) as dali:
        for items in (few, samples.epoch_items(0, 0)[:40].reshape(2, 20)):
            for one, other in zip(plain.of(items), dali.of(items), strict=True):
                assert same(one, other)
                assert_is(other, samples)
        for one, other in zip(plain.raw(few), dali.raw(few), strict=True):
            np.testing.assert_array_equal(one.plan, other.plan)
            assert torch.equal(one.frames, other.frames)
            assert torch.equal(one.target_frames, other.target_frames)
        assert len(other.frames) == 0, "memory goes back before more is taken"


def test_a_worker_uses_memory_again_and_keeps_no_more_than_it_is_asked_for_ahead(make_store):
    table = make_samples(make_store, "one")[0].table
    memory = _Memory(table, table.input_channels, depth=2)
    first = memory.take(2, 4, 0)
    assert first.shape == (2, 2, *table.store.grid.shape)
    assert not np.shares_memory(first, memory.take(4, 4, 1)), "DALI may not have copied it yet"
    assert np.shares_memory(first, memory.take(4, 4, 2))
    for request in (2, 3):  # another worker's pieces, too
        memory.take(3, 4, request)
    for request in range(5, 9):
        again = memory.take(3, 4, request)
        assert not any(np.shares_memory(again, array) for _, array in memory._lent[:-1])
        assert len(memory._lent) + len(memory._spare) <= 2
    assert len(memory.take(9, 9, 20)) == 9


def test_pieces_are_joined_where_they_lie_or_else_copied():
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    fields = np.arange(24.0, dtype=np.float32).reshape(3, 2, 2, 1, 2)
    whole = TensorListCPU(fields)
    joined = _joined(whole, 5)
    np.testing.assert_array_equal(joined, fields.reshape(6, 2, 1, 2)[:5])
    assert joined.data_ptr() == torch.from_dlpack(whole[0]).data_ptr()
    ragged = TensorListCPU([TensorCPU(np.ascontiguousarray(fields[0])), TensorCPU(np.ascontiguousarray(fields[1, :1]))])
    np.testing.assert_array_equal(_joined(ragged, 3), fields.reshape(6, 2, 1, 2)[:3])


def test_left_and_resumed_at_ten_steps_on_one_and_two_ranks_every_sample_comes_once(make_store):
    samples, _ = make_samples(make_store, "drawn", order=Order("blocks", 4))
    rng = np.random.default_rng(0)
    batch, epochs = 6, 6
    steps = len(samples) // batch
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    stops = [*sorted(rng.choice(steps * epochs, 10, replace=False).tolist()), steps * epochs]
    worlds = [[Loader(samples, front="dali")]]
    worlds += [[Loader(samples, front="dali", rank=0, world=2), Loader(samples, rank=1, world=2)]]
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
        assert items == samples.epoch_items(0, epoch)[: steps * batch].tolist()


def test_a_pipeline_restored_from_its_checkpoint_goes_on_in_the_middle_of_an_epoch(make_store):
    samples, _ = make_samples(make_store, "one", "int16")
    batches = samples.epoch_items(0, 0)[:40].reshape(10, 4)
    options = {"workers": 2, "prefetch": 2, "verify": "off", "device": CPU}
    front = DaliFront(samples.table, **options)
    first = front.deliver(batches)
    for _ in range(4):
        next(first)
    kept = front.checkpoint()
    first.close()
    front.close()
    restored = DaliFront(samples.table, **options, checkpoint=kept)
    rest = [raw.plan[2:6].tolist() for raw in restored.deliver(batches)]
    restored.close()
    assert rest == batches[4:].tolist()
    with Loader(samples, front="dali") as loader:  # start_step says the same without it
        resumed = [batch.ids.tolist() for batch in loader.train(0, 0, 4, global_batch=4)]
    assert resumed[:6] == rest


def test_errors_of_a_worker_surface_and_the_loader_lives_on(make_store):
    samples, _ = make_samples(make_store, "one", count=60)
    store = samples.store
    with store.path.open("r+b") as file:
        file.seek(int(store._offsets[30]) + 5)
        file.write(b"\x55")
    damaged = Samples(Store(store.path), samples.window, None, ["a"], ["b"])
    with Loader(damaged, front="dali", verify="all", workers=2) as loader:
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
    loader = Loader(samples, front="dali", workers=2)
    assert_is(next(loader.evaluate(2)), samples)
    first = processes_of(loader)
    os.kill(first[0], signal.SIGKILL)
    with pytest.raises(DataError, match=r"DALI stopped .*lower loader.workers or .*loader.front=plain"):
        list(loader.evaluate(1))
    assert not any(map(alive, first))
    batches = loader.train(0, 0, global_batch=4)  # starts others
    assert_is(next(batches), samples)
    workers, folder = processes_of(loader), loader._reads._schedule.folder
    assert all(map(alive, workers))
    batches.close()
    loader.close()
    assert not any(map(alive, workers))
    assert not folder.exists()


def test_workers_outlive_signals_of_the_job_but_not_their_parent(make_store):
    path = make_store(count=40)[0].path
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("dali_reader.py")), str(path), "8"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    expected = Samples(Store(path), Window((-1, 0), 1)).epoch_items(0, 0)[:18].reshape(9, 2).tolist()
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


@pytest.mark.gpu
def test_fields_go_from_dali_to_torch_on_the_gpu(make_store):
    samples, _ = make_samples(make_store, "drawn", "int16", Order("blocks", 5))
    busy = torch.randn(4096, 4096, device="cuda")
    with Loader(samples, front="dali", workers=2, device="cuda") as gpu, Loader(samples) as cpu:
        for epoch in range(3):
            kept = []
            for one, other in zip(gpu.train(0, epoch, global_batch=4), cpu.train(0, epoch, global_batch=4), strict=True):
                busy = busy @ busy / 64.0  # the stream lags behind DALI, as in training
                kept.append((one, other))
            assert all(same(one, other) for one, other in kept)
