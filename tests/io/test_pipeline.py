import gc
import threading
import time

import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import pipeline
from smoe_hpc.io.pipeline import Samples, train_batches, validation_batches
from smoe_hpc.io.samples import Split, Window, epoch_order
from smoe_hpc.io.statistics import compute_statistics


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "smoe-prefetch"]


def no_thread_left(within: float = 1.0) -> bool:
    end = time.monotonic() + within
    while prefetch_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not prefetch_threads()


def test_a_batch_holds_the_fields_of_its_samples(make_store):
    store, fields = make_store(count=30, channels=("a", "b", "c"))
    samples = Samples(store, Window((-2, 0), 3), None, ["c", "a"], ["b"])
    assert (len(samples), samples.in_channels, samples.out_channels) == (25, 4, 1)
    batch = samples.fetch([7, 0])
    assert batch.inputs.shape == (2, 4, 4, 5)
    assert batch.inputs.is_contiguous()
    assert batch.inputs.dtype == batch.targets.dtype == torch.float32
    # sample 7 starts at row 9: fields 7 and 9, target 12; oldest field first, channels in the order asked for
    np.testing.assert_array_equal(batch.inputs[0].numpy(), fields[[7, 9]][:, [2, 0]].reshape(4, 4, 5))
    np.testing.assert_array_equal(batch.targets[0].numpy(), fields[12, [1]])
    assert batch.ids.tolist() == [7, 0]


def test_normalised_by_channel_and_back(make_store):
    store, fields = make_store(count=30)
    statistics = compute_statistics(store, Split("2019-03-01/2019-03-01"))
    samples = Samples(store, Window((-1, 0), 1), Split("2019-03-01/2019-03-01"), None, ["z500"], statistics)
    batch = samples.fetch([3])
    mean, std = (np.array(part, np.float32)[:, None, None] for part in (statistics.mean, statistics.std))
    np.testing.assert_array_equal(batch.inputs[0, :2].numpy(), (fields[3] - mean) / std)
    back = batch.targets * samples.target_std + samples.target_mean
    np.testing.assert_allclose(back[0].numpy(), fields[5, [1]], atol=1e-6)


def test_filled_up_entries_are_zero_and_marked(make_store):
    store, _ = make_store(count=10)
    statistics = compute_statistics(store, Split("2019-03-01/2019-03-01"))
    samples = Samples(store, Window((0,), 1), statistics=statistics)
    batch, whole = samples.fetch([4, -1, 2]), samples.fetch([4, 2])
    assert batch.valid.tolist() == [True, False, True]
    assert (batch.inputs[1] == 0).all()
    torch.testing.assert_close(batch.inputs[[0, 2]], whole.inputs, rtol=0, atol=0)
    torch.testing.assert_close(batch.targets[[0, 2]], whole.targets, rtol=0, atol=0)
    assert not samples.fetch([-1]).valid.any()
    assert batch.to("cpu", torch.float64).inputs.dtype == torch.float64
    assert batch.to("cpu", torch.float64).ids.dtype == torch.int64


def test_bad_samples_are_refused(make_store):
    store, _ = make_store()
    statistics = compute_statistics(store, Split("2019-03-01/2019-03-01"), ["t2m"])
    with pytest.raises(DataError, match="did you mean 't2m'"):
        Samples(store, Window((0,), 1), None, ["t2n"])
    with pytest.raises(DataError, match="statistics are of other channels"):
        Samples(store, Window((0,), 1), statistics=statistics)
    with pytest.raises(DataError, match="sample 11 does not exist; there are 11"):
        Samples(store, Window((0,), 1)).fetch([11])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_resumption_give_the_batches_of_one_process(make_store, world, accumulation):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    options = {"seed": 5, "epoch": 2, "global_batch": 8}
    whole = [batch.ids.tolist() for batch in train_batches(samples, **options)]
    assert [i for ids in whole for i in ids] == epoch_order(29, 5, 2)[:24].tolist()
    for start in (0, 1, 2, 3):
        ranks = [
            [
                b.ids
                for b in train_batches(
                    samples, **options, start_step=start, accumulation=accumulation, rank=r, world=world
                )
            ]
            for r in range(world)
        ]
        for step in range(3 - start):
            together = [torch.cat(ids[step * accumulation : (step + 1) * accumulation]) for ids in ranks]
            assert torch.cat(together).tolist() == whole[start + step]


def test_validation_visits_every_sample_once(make_store):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    parts = [list(validation_batches(samples, batch=4, rank=rank, world=3)) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    ids = torch.cat([batch.ids[batch.valid] for part in parts for batch in part])
    assert sorted(ids.tolist()) == list(range(29))


def test_bad_arguments_raise_at_once(make_store):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    with pytest.raises(DataError, match="divisible"):
        train_batches(samples, seed=0, epoch=0, global_batch=7, world=2)
    with pytest.raises(DataError, match="do not fill one batch"):
        train_batches(samples, seed=0, epoch=0, global_batch=64)
    assert not prefetch_threads()


def test_the_thread_reads_ahead_but_not_far(make_store, monkeypatch):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    made = []
    fetch = samples.fetch
    monkeypatch.setattr(samples, "fetch", lambda ids: made.append(len(made)) or fetch(ids))
    batches = train_batches(samples, seed=0, epoch=0, global_batch=2)
    next(batches)
    time.sleep(0.2)
    assert 2 <= len(made) <= pipeline.PREFETCH + 2  # one used, the queue full, one waiting for room
    batches.close()


def test_errors_reach_the_consumer_in_order(make_store):
    store, _ = make_store(count=30)
    samples = Samples(store, Window((0,), 1))
    store.read([0])
    last = int(store._offsets.max())
    with store.path.open("r+b") as file:
        file.truncate(last - 10)
    batches = validation_batches(samples, batch=1)
    with pytest.raises(DataError, match="truncated"):  # noqa: PT012
        for count, _ in enumerate(batches):
            assert count < 28
    assert no_thread_left()


@pytest.mark.parametrize("end", ["close", "collect", "exhaust", "never started"])
def test_the_thread_ends_with_the_iterator(make_store, end):
    samples = Samples(make_store(count=200)[0], Window((0,), 1))
    batches = train_batches(samples, seed=0, epoch=0, global_batch=2)
    if end != "never started":
        next(batches)
        assert prefetch_threads()
    started = time.monotonic()
    if end == "close":
        batches.close()
        assert not prefetch_threads()
    elif end == "exhaust":
        assert sum(1 for _ in batches) == 98
    del batches
    gc.collect()
    assert no_thread_left()
    assert time.monotonic() - started < 1


def test_torch_threads_are_left_alone(make_store):
    before = torch.get_num_threads()
    list(train_batches(Samples(make_store()[0], Window((0,), 1)), seed=0, epoch=0, global_batch=2))
    assert torch.get_num_threads() == before
