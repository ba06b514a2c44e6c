import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io.sampling.order import (
    Order,
    batch_positions,
    drawn_leads,
    epoch_order,
    evaluation_batches,
    rank_positions,
    steps_per_epoch,
)


def test_the_order_is_a_shuffle_by_seed_and_epoch():
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(orders[0], epoch_order(1000, 0, 0))
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (3, 2), (4, 3), (12, 1), (1, 12), (6, 2)])
def test_ranks_together_take_the_batch_of_one_process(world, accumulation):
    samples, batch = 101, 12
    steps = steps_per_epoch(samples, batch)
    seen = []
    for step in range(steps):
        whole = batch_positions(samples, batch, 1, 0, 1, step).ravel()
        parts = [batch_positions(samples, batch, accumulation, rank, world, step) for rank in range(world)]
        assert {part.shape for part in parts} == {(accumulation, batch // world // accumulation)}
        np.testing.assert_array_equal(np.concatenate([part.ravel() for part in parts]), whole)
        seen += whole.tolist()
    assert seen == list(range(96))  # each position once; 5 of 101 do not fill a batch


@pytest.mark.parametrize("samples", [1, 5, 24, 25, 101])
@pytest.mark.parametrize(("batch", "world"), [(1, 1), (4, 1), (4, 3), (7, 2)])
def test_evaluation_covers_each_sample_once_in_equal_steps(samples, batch, world):
    parts = [evaluation_batches(samples, batch, rank, world) for rank in range(world)]
    assert len({part.shape for part in parts}) == 1
    taken = np.stack(parts, axis=1).ravel()
    assert taken[taken >= 0].tolist() == list(range(samples))
    assert (taken < 0).sum() < batch * world


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 10, 1, 0, 3, 0), "divisible by 3 ranks x 1 accumulation; try 12"),
        ((100, 12, 5, 0, 1, 0), "try 15"),
        ((5, 12, 1, 0, 1, 0), "5 samples do not fill one batch of 12"),
        ((100, 10, 1, 0, 1, 10), "outside the epoch's 10 steps"),
        ((100, 10, 1, 2, 2, 0), "rank 2 of 2"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        batch_positions(*arguments)


@pytest.mark.parametrize("length", [1, 3, 8, 1000])
@pytest.mark.parametrize("samples", [1, 7, 101])
def test_blocks_keep_neighbours_together_and_every_start_once(length, samples):
    orders = [Order("blocks", length).starts(samples, seed, epoch) for seed in (0, 1) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(samples))
        runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
        assert max(len(run) for run in runs) <= samples
        assert len(runs) <= -(-samples // length) + 1  # the cut moves: one block more at most
    np.testing.assert_array_equal(orders[0], Order("blocks", length).starts(samples, 0, 0))
    if samples == 101 and 1 < length < 50:
        cuts = {tuple(sorted(run[0] % length for run in np.split(o, np.flatnonzero(np.diff(o) != 1) + 1))) for o in orders}
        assert len(cuts) > 1, "every epoch cuts elsewhere"


def test_the_global_order_is_the_order_of_epochs():
    np.testing.assert_array_equal(Order().starts(50, 3, 4), epoch_order(50, 3, 4))
    assert Order("blocks", 4).starts(0, 0, 0).tolist() == []


@pytest.mark.parametrize(("arguments", "message"), [(("some",), "choose global or blocks"), (("blocks", 0), "data.block=1")])
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        Order(*arguments)


def test_leads_are_drawn_evenly_by_start_and_epoch():
    draws = np.stack([drawn_leads(900, 3, 7, epoch) for epoch in range(4)])
    assert draws.min() == 0
    assert draws.max() == 2
    assert np.abs(np.bincount(draws.ravel()) / draws.size - 1 / 3).max() < 0.05
    assert all((draws[0] != draws[epoch]).mean() > 0.5 for epoch in range(1, 4))
    np.testing.assert_array_equal(drawn_leads(10, 3, 7, 0), draws[0, :10])  # of a start, whatever else there is


@pytest.mark.parametrize("order", [Order(), Order("blocks", 8)])
@pytest.mark.parametrize("chance", range(3))
def test_stopped_at_ten_steps_and_resumed_on_other_ranks_every_sample_comes_once(order, chance):
    rng = np.random.default_rng(chance)
    samples, batch, epochs = 97, 12, 4
    steps = steps_per_epoch(samples, batch)
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    stops = [*sorted(rng.choice(steps * epochs, 10, replace=False).tolist()), steps * epochs]
    at = 0
    for stop in stops:  # each stretch on 1, 2 or 3 ranks, accumulating or not
        world, accumulation = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        while at < stop:
            epoch, step = divmod(at, steps)
            items = order.starts(samples, 5, epoch)
            ranks = [rank_positions(samples, batch, accumulation, rank, world, step)[:accumulation] for rank in range(world)]
            seen[epoch] += [int(i) for part in ranks for i in items[part].ravel()]
            at += 1
    for epoch, items in seen.items():
        assert items == order.starts(samples, 5, epoch)[: steps * batch].tolist()
