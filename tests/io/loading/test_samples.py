import h5py
import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store, StoreWriter, open_store
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.order import Order, epoch_order
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import compute_statistics

from ..conftest import hourly
from .made_samples import WINDOWS, CountedReads, assert_is, make_samples


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
    assert batch.to("cpu", torch.float32).inputs is batch.inputs


def test_bad_samples_are_refused(make_store):
    store, _ = make_store()
    statistics = compute_statistics(store, Split("2019-03-01/2019-03-01"), ["t2m"])
    with pytest.raises(DataError, match="did you mean 't2m'"):
        Samples(store, Window((0,), 1), None, ["t2n"])
    with pytest.raises(DataError, match="statistics are of other channels"):
        Samples(store, Window((0,), 1), statistics=statistics)
    for item in (11, -2):
        with pytest.raises(DataError, match=f"sample {item} does not exist"):
            Samples(store, Window((0,), 1)).fetch([item])
    with pytest.raises(DataError, match="sample 22 does not exist; there are 20"):
        Samples(store, Window((0,), (1, 2), "each")).fetch([22])


def test_names_and_places_of_channels(make_store):
    samples, _ = make_samples(make_store, "stacked")
    assert (samples.in_channels, samples.out_channels) == (2 * 2 + 2, 2 * 2)
    assert samples.target_names == ["b_1h", "c_1h", "b_3h", "c_3h"]
    assert samples.newest is None  # b is no input
    assert samples.target_mean.shape == (4, 1, 1)
    assert samples.target_mean[0] == samples.target_mean[2] != samples.target_mean[1]
    own = Samples(samples.store, Window((-1, 0), (1, 3)), None, ["c", "a", "b"], ["b", "c"])
    assert own.newest == [5, 3, 5, 3]
    batch = own.fetch([4])
    np.testing.assert_array_equal(batch.inputs[0, own.newest[:2]].numpy(), samples.store.read([5], ["b", "c"])[0])
    drawn, _ = make_samples(make_store, "drawn", name="other.h5")
    assert (drawn.in_channels, drawn.out_channels, drawn.target_names) == (3 * 2 + 2 + 1, 2, ["b", "c"])


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_items_mean_the_same_in_every_epoch(make_store, kind):
    samples, _ = make_samples(make_store, kind, order=Order("blocks", 6))
    starts, leads = len(samples.input_rows), len(samples.window.leads)
    each = starts * leads if samples.window.by_lead else starts
    assert samples.all_ids().tolist() == list(range(each))
    for epoch in range(3):
        items = samples.epoch_ids(9, epoch)
        assert len(items) == len(samples) == (each if kind == "each" else starts)
        assert len(set(items.tolist())) == len(items)
        if kind == "drawn":
            assert sorted((items // leads).tolist()) == list(range(starts))
            assert len(set((items % leads).tolist())) == leads
            other = samples.epoch_ids(9, epoch + 1)
            assert (np.sort(items) % leads).tolist() != (np.sort(other) % leads).tolist()  # by start
        assert_is(samples.fetch(items[:4]), samples)


def test_the_order_of_an_epoch_is_as_it_always_was(make_store):
    samples = Samples(make_store(count=30)[0], Window((0,), 1))
    np.testing.assert_array_equal(samples.epoch_ids(5, 2), epoch_order(29, 5, 2))


def test_windows_cross_from_file_to_file(make_store, tmp_path):
    whole, fields = make_store(count=30)
    folder = tmp_path / "years"
    folder.mkdir()
    for number, (first, end) in enumerate(((0, 11), (11, 12), (12, 30))):
        path = folder / f"part_{number}.h5"
        with StoreWriter(path, whole.grid, whole.channels, whole.units, coords={"time": hourly(30)[first:end]}) as writer:
            writer.write(0, fields[first:end])
    series = open_store(folder)
    for kind in WINDOWS:
        one, several = (Samples(store, WINDOWS[kind], None, None, ["z500"], gaps="refuse") for store in (whole, series))
        assert len(one) == len(several)
        items = one.epoch_ids(0, 0)
        assert torch.equal(one.fetch(items).inputs, several.fetch(items).inputs)
        assert torch.equal(one.fetch(items).targets, several.fetch(items).targets)


def test_a_missing_hour_is_refused_with_its_file_or_its_windows_are_left_out(make_store):
    times = np.delete(hourly(30), 12)
    store, _ = make_store(count=29, coords={"time": times})
    message = rf"1 times are missing, the first between {store.path} time 2019-03-01T11.* and .*T13.* set data.gaps=skip"
    with pytest.raises(DataError, match=message):
        Samples(store, Window((-1, 0), 2), gaps="refuse")
    skipping = Samples(store, Window((-1, 0), 2), gaps="skip")
    assert len(skipping) == 27 - 3  # starts 10, 12 and 13 would need it
    starts = times[skipping.input_rows[:, -1]]
    assert not set(np.datetime64("2019-03-01T00") + np.array([10, 12, 13]) * np.timedelta64(1, "h")) & set(starts)


def test_fields_that_samples_share_are_read_once(make_store, monkeypatch):
    samples, _ = make_samples(make_store, "drawn")
    counted = CountedReads(samples.store, monkeypatch)
    leads = len(samples.window.leads)
    samples.fetch([start * leads for start in range(8)])  # 8 starts with 3 inputs each: 10 fields
    inputs = [row for row, channels in counted.reads if channels == ("c", "a")]
    targets = [row for row, channels in counted.reads if channels == ("b", "c")]
    assert sorted(inputs) == list(range(10))
    assert len(targets) == len(set(targets)) == 8


def test_a_value_that_is_not_finite_is_found_and_named(make_store):
    path = make_store(count=20, channels=("a", "b"))[0].path
    with h5py.File(path, "r+") as file:  # a writer of ours refuses it
        file["fields"][7, 1, 2, 3] = np.nan
        file["fields"][9, 0, 0, 0] = np.inf
    samples = Samples(Store(path), Window((0,), 2), None, ["a"], ["b"])
    assert samples.find_not_finite([0, 1, 2, 4, 10]) is None
    found = samples.find_not_finite([3, 5])  # 5 + 2 = 7 is its target
    assert found == f"{path} time 2019-03-01T07:00:00, channel 'b': 1 value is not finite, at lat 2, lon 3"
    assert "T09:00:00, channel 'a': 1 value is not finite, at lat 0, lon 0" in str(samples.find_not_finite([9, 5]))
