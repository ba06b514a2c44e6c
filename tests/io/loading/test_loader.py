import gc
import logging
import os
import threading
import time

import h5py
import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store
from smoe_hpc.io.loading.dali import backend
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.pinned import pinned
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.loading.threads import THREAD_NAME
from smoe_hpc.io.sampling.order import Order, epoch_order
from smoe_hpc.io.sampling.windows import Window

from ..store_files import flip_bit
from .made_samples import WINDOWS, CountedReads, assert_is, make_samples, same, wait_until


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith((THREAD_NAME, "smoe-read"))]


def open_files(path) -> int:  # type: ignore[no-untyped-def]
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(link) and os.readlink(link) == str(path) for link in links)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
@pytest.mark.parametrize("kind", list(WINDOWS))
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 3), (3, 2)])
def test_what_is_loaded_is_what_would_be_fetched(make_store, kind, dtype, workers, prefetch):
    samples, _ = make_samples(make_store, kind, dtype, Order("blocks", 5))
    with Loader(samples, workers=workers, prefetch=prefetch) as loader:
        assert loader.backend == "threads"
        for epoch in range(2):
            batches = list(loader.train(3, epoch, global_batch=6, accumulation=2))
            assert torch.cat([b.ids for b in batches]).tolist() == samples.epoch_ids(3, epoch)[: 3 * len(batches)].tolist()
            for batch in batches:  # kept beyond the next: nothing is written over
                assert same(batch, samples.fetch(batch.ids.numpy()))
        assert_is(batches[-1], samples)
        whole = list(loader.evaluate(7))
        assert torch.cat([b.ids[b.valid] for b in whole]).tolist() == samples.all_ids().tolist()
        for batch in whole:
            assert_is(batch, samples)
    assert not reading_threads()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_resumption_give_the_batches_of_one_process(make_store, world, accumulation):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    whole = [batch.ids.tolist() for batch in Loader(samples).train(5, 2, global_batch=8)]
    assert [i for ids in whole for i in ids] == epoch_order(29, 5, 2)[:24].tolist()
    for start in (0, 1, 2, 3):
        ranks = [
            [b.ids for b in Loader(samples, rank=r, world=world).train(5, 2, start, global_batch=8, accumulation=accumulation)]
            for r in range(world)
        ]
        for step in range(3 - start):
            together = [torch.cat(ids[step * accumulation : (step + 1) * accumulation]) for ids in ranks]
            assert torch.cat(together).tolist() == whole[start + step]


@pytest.mark.parametrize("chance", range(3))
def test_killed_at_ten_steps_and_resumed_on_other_ranks_every_sample_is_read_once(make_store, chance):
    samples, _ = make_samples(make_store, "drawn", order=Order("blocks", 4))
    rng = np.random.default_rng(chance)
    batch, epochs = 6, 6
    steps = len(samples) // batch
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    stops = [*sorted(rng.choice(steps * epochs, 10, replace=False).tolist()), steps * epochs]
    at = 0
    for stop in stops:
        world = int(rng.integers(1, 4))
        loaders = [Loader(samples, rank=rank, world=world, prefetch=2) for rank in range(world)]
        while at < stop:
            epoch, step = divmod(at, steps)
            ranks = [loader.train(0, epoch, step, global_batch=batch) for loader in loaders]
            for _ in range(min(stop - at, steps - step)):
                for part in map(next, ranks):
                    assert_is(part, samples)
                    seen[epoch] += part.ids.tolist()
                at += 1
            for iterator in ranks:
                iterator.close()  # with batches read ahead
        for loader in loaders:
            loader.close()
    for epoch, items in seen.items():
        assert items == samples.epoch_ids(0, epoch)[: steps * batch].tolist()


def test_evaluation_visits_every_sample_once(make_store):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    parts = [list(Loader(samples, rank=rank, world=3).evaluate(4)) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    ids = torch.cat([batch.ids[batch.valid] for part in parts for batch in part])
    assert sorted(ids.tolist()) == list(range(29))


def test_bad_arguments_raise_at_once(make_store):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    with pytest.raises(DataError, match="divisible"):
        Loader(samples, world=2).train(0, 0, global_batch=7)
    with pytest.raises(DataError, match="do not fill one batch"):
        Loader(samples).train(0, 0, global_batch=64)
    for options, message in (
        ({"backend": "magic"}, "choose one of threads, dali, auto"),
        ({"workers": 0}, "must be 1 or more"),
        ({"prefetch": 0}, "must be 1 or more"),
        ({"verify": "some"}, "'some' is unknown"),
    ):
        with pytest.raises(DataError, match=message):
            Loader(samples, **options)
    assert not reading_threads()


def test_reading_goes_ahead_but_not_far(make_store, monkeypatch):
    samples = Samples(make_store(count=30)[0], Window((0,), 1), None, ["t2m"], ["z500"])
    counted = CountedReads(samples.store, monkeypatch)
    batches = Loader(samples, prefetch=3).train(0, 0, global_batch=2)
    next(batches)
    ahead = 4 * 2 * 2  # reads: of the batch in use and three more, 2 samples each, an input and a target
    assert wait_until(lambda: len(counted.reads) >= ahead)
    time.sleep(0.2)
    assert len(counted.reads) == ahead
    batches.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_fields_of_a_batch_are_read_once_whoever_reads_them(make_store, monkeypatch, workers):
    samples, _ = make_samples(make_store, "drawn", order=Order("blocks", 100))
    counted = CountedReads(samples.store, monkeypatch)
    with Loader(samples, workers=workers) as loader:
        batches = list(loader.train(0, 0, global_batch=10))
    inputs = [row for row, channels in counted.reads if channels == ("c", "a")]
    wanted = [set(samples.table.rows_of(batch.ids.numpy())[0].ravel().tolist()) for batch in batches]
    assert sorted(inputs) == sorted(row for rows in wanted for row in rows)
    assert len(inputs) < 0.5 * len(batches) * 10 * 3


def test_errors_reach_the_consumer_in_order(make_store):
    store, _ = make_store(count=30)
    samples = Samples(store, Window((0,), 1))
    store.read([0])
    batches = Loader(samples, workers=2).evaluate(1)
    with pytest.raises(DataError, match=r"store.h5 was changed since it was opened"):  # noqa: PT012
        for count, batch in enumerate(batches):
            assert batch.ids.tolist() == [count]
            if count == 5:
                os.utime(store.path, ns=(1, 1))
            assert count < 28
    gc.collect()
    assert wait_until(lambda: not reading_threads())


@pytest.mark.parametrize("end", ["close", "collect", "exhaust", "never started", "error in the consumer"])
@pytest.mark.parametrize("workers", [1, 3])
def test_threads_end_with_the_iterator_and_the_loader(make_store, end, workers):
    samples = Samples(make_store(count=200)[0], Window((0,), 1))
    loader = Loader(samples, workers=workers)
    batches = loader.train(0, 0, global_batch=2)
    if end != "never started":
        next(batches)
        assert reading_threads()
    started = time.monotonic()
    if end == "close":
        batches.close()
        assert not [thread for thread in reading_threads() if thread.name == THREAD_NAME]
    elif end == "exhaust":
        assert sum(1 for _ in batches) == 98
    elif end == "error in the consumer":
        with pytest.raises(ZeroDivisionError):
            list(map(lambda batch: 1 / 0, batches))  # noqa: C417
    del batches
    gc.collect()
    loader.close()
    assert wait_until(lambda: not reading_threads())
    assert time.monotonic() - started < 10, "something was waited for; the machine may be busy, though not that busy"
    samples.store.close()
    assert open_files(samples.store.path) == 0


def test_two_iterators_of_a_loader_do_not_disturb_each_other(make_store):
    samples, _ = make_samples(make_store, "one")
    with Loader(samples) as loader:
        train = loader.train(0, 0, global_batch=4)
        for _ in range(3):
            assert_is(next(train), samples)
            for batch in loader.evaluate(4):
                assert_is(batch, samples)
        train.close()


def test_torch_threads_are_left_alone(make_store):
    before = torch.get_num_threads()
    list(Loader(Samples(make_store()[0], Window((0,), 1)), workers=2).train(0, 0, global_batch=2))
    assert torch.get_num_threads() == before


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_ten_thousand_samples(make_store):
    samples, _ = make_samples(make_store, "drawn", "int16", Order("blocks", 8), count=244)
    sizes = []
    with Loader(samples, workers=2, prefetch=3) as loader:
        for epoch in range(42):  # of 240 samples
            for batch in loader.train(0, epoch, global_batch=16):
                del batch
            gc.collect()
            sizes.append(resident_bytes())
    assert 42 * 240 > 10_000
    assert max(sizes[10:]) - sizes[9] < 2 << 20, [size >> 10 for size in sizes]


def addresses(loader: Loader, ids: np.ndarray) -> set[int]:
    """Where fields are as they are stored, over some batches."""
    return {stored.frames.data_ptr() for stored in loader.stored(ids)}


def test_the_ring_of_buffers_is_used_again(make_store):
    samples, _ = make_samples(make_store, "one")
    ids = samples.epoch_ids(0, 0)[:40].reshape(10, 4)
    with Loader(samples, prefetch=2) as loader:
        ring = addresses(loader, ids)
        assert len(ring) == 3
        assert addresses(loader, ids[::-1]) == ring
        assert len(addresses(loader, ids.reshape(8, 5))) == 3


def test_a_flipped_bit_is_caught_when_checksums_are_looked_at(make_store):
    samples, _ = make_samples(make_store, "one", count=80)
    flip_bit(samples.store, 40)  # in channel a
    store = Store(samples.store.path)
    damaged = Samples(store, samples.window, None, ["c", "a"], ["b"], samples.statistics)
    with Loader(damaged) as loader:
        assert sum(len(batch.ids) for batch in loader.train(0, 0, global_batch=5)) == 75
    message = r"store.h5 time 2019-03-02T16:00:00 \(row 40\) is damaged.*data verify"
    with Loader(damaged, verify="all", workers=2) as loader, pytest.raises(DataError, match=message):
        list(loader.train(0, 0, global_batch=5))


def test_sampled_checks_look_at_the_same_few_rows_always(make_store, monkeypatch):
    samples, _ = make_samples(make_store, "one", count=300)
    checked: list[set[int]] = []
    read = Store.read_stored

    def noted(this, rows, channels=None, out=None, check=False):  # type: ignore[no-untyped-def]
        if check:
            checked[-1] |= set(np.asarray(rows).tolist())
        return read(this, rows, channels, out, check)

    monkeypatch.setattr(Store, "read_stored", noted)
    for workers, batch in ((1, 7), (3, 20)):
        checked.append(set())
        with Loader(samples, verify="sampled", workers=workers) as loader:
            for got in loader.evaluate(batch):
                assert_is(got, samples) if len(checked) == 1 else None
    assert checked[0] == checked[1]
    assert 2 <= len(checked[0]) <= 8  # of 300


def test_compressed_stores_are_read_by_threads_too(make_store):
    samples, _ = make_samples(make_store, "drawn", "int16", compression="gzip")
    assert not samples.store.direct
    with Loader(samples, workers=2) as loader:
        for batch in loader.train(0, 0, global_batch=8):
            assert_is(batch, samples)


def test_raw_batches_are_what_is_stored(make_store):
    samples, _ = make_samples(make_store, "one", "int16")
    items = samples.epoch_ids(0, 0)[:8].reshape(2, 4)
    with Loader(samples) as loader:
        for stored, part in zip(loader.stored(items), items, strict=True):
            plan = samples.table.plan(part)
            assert stored.frames.dtype == torch.int16
            np.testing.assert_array_equal(stored.frames.numpy(), samples.store.read_stored(plan.rows, ["c", "a"]))
            np.testing.assert_array_equal(stored.target_frames.numpy(), samples.store.read_stored(plan.target_rows, ["b", "c"]))


def test_auto_reads_in_threads_where_dali_is_not_installed(make_store, monkeypatch, caplog):
    samples, _ = make_samples(make_store, "one")
    monkeypatch.setattr(backend, "installed", lambda: False)
    with caplog.at_level(logging.INFO), Loader(samples, backend="auto") as loader:
        assert loader.backend == "threads"
    assert [record.message for record in caplog.records if "nvidia-dali" in record.message] == [
        "batches are read by threads (loader.backend=threads), as NVIDIA DALI is not installed; pip install "
        "nvidia-dali-cuda130 (extra dali of smoe-hpc), or set loader.backend=threads"
    ]
    with pytest.raises(DataError, match=r"needs NVIDIA DALI, which is not installed: pip install .*loader.backend=threads"):
        Loader(samples, backend="dali")


def test_double_precision_batches_hold_the_same_numbers(make_store):
    samples, _ = make_samples(make_store, "one")
    with Loader(samples, dtype=torch.float64) as loader, Loader(samples) as single:
        for one, other in zip(loader.train(0, 1, global_batch=8), single.train(0, 1, global_batch=8), strict=True):
            assert one.inputs.dtype == one.targets.dtype == torch.float64
            assert torch.equal(one.inputs, other.inputs.double())
            assert torch.equal(one.targets, other.targets.double())
        assert sum(int(batch.valid.sum()) for batch in loader.evaluate(4)) == len(samples)


def test_a_store_that_is_cut_short_while_reading_is_an_error(make_store):
    samples, _ = make_samples(make_store, "one", count=200)
    batches = Loader(samples, prefetch=1).train(0, 0, global_batch=4)
    next(batches)
    os.truncate(samples.store.path, samples.store.path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"changed|truncated"):
        list(batches)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "int16"])
@pytest.mark.parametrize("kind", ["drawn", "stacked"])
def test_batches_on_a_gpu_are_the_same_to_the_bit(make_store, kind, dtype):
    samples, _ = make_samples(make_store, kind, dtype, Order("blocks", 5))
    busy = torch.randn(4096, 4096, device="cuda")
    with Loader(samples, device="cuda", workers=2, prefetch=2) as gpu, Loader(samples) as cpu:
        for epoch in range(2):
            kept = []
            for one, other in zip(gpu.train(0, epoch, global_batch=4), cpu.train(0, epoch, global_batch=4), strict=True):
                assert one.inputs.is_cuda
                busy = busy @ busy / 64.0  # the stream lags behind the reader, as in training
                kept.append((one, other))
            assert all(same(one, other) for one, other in kept)


@pytest.mark.gpu
def test_buffers_on_a_gpu_are_used_again(make_store):
    samples, _ = make_samples(make_store, "one")
    ids = samples.epoch_ids(0, 0)[:40].reshape(10, 4)
    with Loader(samples, device="cuda") as loader:
        ring = addresses(loader, ids)
        assert len(ring) == 3
        assert addresses(loader, ids[::-1]) == ring


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5), (700, 1000)])
def test_memory_for_copies_to_a_gpu_is_page_locked(shape):
    tensor = pinned(shape, torch.int16)
    assert (tensor.shape, tensor.dtype, tensor.is_pinned()) == (shape, torch.int16, True)


def test_values_that_are_not_finite_pass_the_loader(make_store):
    path = make_store(count=20)[0].path
    with h5py.File(path, "r+") as file:
        file["fields"][7, 1, 2, 3] = np.nan
    with Loader(Samples(Store(path), Window((0,), 1))) as loader:
        assert sum(int(batch.inputs.isnan().sum()) for batch in loader.evaluate(3)) == 1
