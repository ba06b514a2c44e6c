import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io.loading.decoding import StoredBatch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.windows import Window

from .made_samples import WINDOWS, assert_is, make_samples, same


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16"])
@pytest.mark.parametrize("kind", list(WINDOWS))
@pytest.mark.parametrize("constants", [True, False], ids=["constants", "bare"])
def test_batches_are_what_one_sample_after_the_other_would_be(make_store, kind, dtype, constants):
    samples, _ = make_samples(make_store, kind, dtype, constants=constants)
    last = samples.table.num_ids - 1
    for items in ([7, 0, 11, last], [5, 6, 7, 8], [3, 3, 3], [4, -1, 2, -1], [9]):  # shuffled, sharing, the same, filled up
        batch = samples.fetch(items)
        assert batch.inputs.shape == (len(items), samples.in_channels, 4, 5)
        assert batch.targets.shape == (len(items), samples.out_channels, 4, 5)
        assert batch.inputs.is_contiguous()
        assert batch.targets.is_contiguous()
        assert batch.ids.tolist() == items
        assert_is(batch, samples)
    assert not samples.fetch([-1, -1]).inputs.any()


def test_encoded_fields_come_near_to_what_was_written(make_store):
    for dtype, error in (("int16", 2.4e-4), ("float16", 4e-3)):
        samples, fields = make_samples(make_store, "one", dtype, name=f"{dtype}.h5")
        batch = samples.fetch([7])
        values = batch.targets[0] * samples.target_std + samples.target_mean
        np.testing.assert_allclose(values.numpy(), fields[12, [1, 2]], atol=error)


def test_encoded_fields_without_statistics_are_in_their_units(make_store):
    samples, fields = make_samples(make_store, "one", "int16")
    bare = Samples(samples.store, Window((0,), 1), None, ["a"], ["d"])
    np.testing.assert_allclose(bare.fetch([3]).inputs[0].numpy(), fields[3, [0]], atol=2.4e-4)
    np.testing.assert_allclose(bare.fetch([3]).targets[0].numpy(), fields[4, [3]], atol=2.4e-4)


def test_plain_fields_without_statistics_are_left_to_the_bit(make_store):
    store, fields = make_store(count=10)
    batch = Samples(store, Window((0,), 1)).fetch([4, 4, 2])
    np.testing.assert_array_equal(batch.inputs.numpy(), fields[[4, 4, 2]])
    np.testing.assert_array_equal(batch.targets.numpy(), fields[[5, 5, 3]])


def test_gathering_again_and_again_takes_no_new_memory(make_store, monkeypatch):
    samples, _ = make_samples(make_store, "drawn", "int16")
    decoder = samples.decoder()
    plan = samples.table.plan(np.array([4, 5, 6, 7]))
    frames = torch.from_numpy(samples.store.read_stored(plan.rows, samples.input_channels))
    targets = torch.from_numpy(samples.store.read_stored(plan.target_rows, samples.target_channels))
    stored = StoredBatch(plan, torch.from_numpy(plan.pack()), frames, targets)
    taken, empty = [], torch.empty

    def noted(*shape, **options):  # type: ignore[no-untyped-def]
        taken.append(options.get("dtype"))
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", noted)
    first = decoder(stored)
    assert torch.int16 in taken
    taken.clear()
    assert same(first, decoder(stored))
    assert torch.int16 not in taken
    assert_is(first, samples)


def test_double_precision_batches_are_the_same_numbers(make_store):
    samples, _ = make_samples(make_store, "stacked", "int16")
    plan = samples.table.plan(np.array([1, -1]))
    parts = [samples.store.read_stored(plan.rows, samples.input_channels)]
    parts.append(samples.store.read_stored(plan.target_rows, samples.target_channels))
    stored = StoredBatch(plan, torch.from_numpy(plan.pack()), *map(torch.from_numpy, parts))
    double = samples.decoder("cpu", torch.float64)(stored)
    assert double.inputs.dtype == double.targets.dtype == torch.float64
    assert torch.equal(double.inputs, samples.fetch([1, -1]).inputs.double())


def test_constants_that_cannot_be_are_refused(make_store):
    store, _ = make_store(constants={"flat": np.ones((4, 5)), "orography": np.arange(20.0).reshape(4, 5)})
    with pytest.raises(DataError, match="no constant 'orograhpy'; did you mean 'orography'"):
        Samples(store, Window((0,), 1), constants=["orograhpy"])
    with pytest.raises(DataError, match=r"'flat' of .* tells no place from another; leave it out of data.constants"):
        Samples(store, Window((0,), 1), constants=["flat"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "int16"])
def test_a_gpu_decodes_to_the_same_bits(make_store, dtype):
    samples, _ = make_samples(make_store, "drawn", dtype)
    plan = samples.table.plan(np.array([7, 0, 11, -1]))
    frames = torch.from_numpy(samples.store.read_stored(plan.rows, samples.input_channels)).cuda()
    targets = torch.from_numpy(samples.store.read_stored(plan.target_rows, samples.target_channels)).cuda()
    batch = samples.decoder("cuda")(StoredBatch(plan, torch.from_numpy(plan.pack()).cuda(), frames, targets))
    assert batch.inputs.is_cuda
    assert same(batch, samples.fetch([7, 0, 11, -1]))
