"""Samples of many kinds, and what they are held against: made one by one, in numpy, so that nobody can doubt it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from smoe_hpc.io import Encoding, Store
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.order import Order
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import compute_statistics

CHANNELS = ("a", "b", "c", "d")
WINDOWS = {
    "one": Window((-2, 0), 3),
    "stacked": Window((-2, 0), (1, 3)),
    "drawn": Window((-2, -1, 0), (1, 3, 4), "drawn"),
    "each": Window((-1, 0), (1, 3), "each"),
}


def six_sigma(dtype: str) -> Encoding:
    """An encoding that normally distributed fields fit in."""
    return Encoding.of_bounds(dtype, [-7.0] * len(CHANNELS), [8.0] * len(CHANNELS))


def make_samples(
    make_store, kind: str = "drawn", dtype: str = "float32", order: Order | None = None, *, constants: bool = True, **options
) -> tuple[Samples, np.ndarray]:
    """Samples of 48 hourly fields, normalised, and the fields."""
    grid_constants = {"orography": np.arange(20.0).reshape(4, 5), "mask": np.tile([0, 1, 0, 0, 1], (4, 1))}
    encoding = None if dtype == "float32" else six_sigma(dtype)
    count = options.pop("count", 48)
    store, fields = make_store(
        count=count, channels=CHANNELS, constants=grid_constants, dtype=dtype, encoding=encoding, **options
    )
    statistics = compute_statistics(store, Split("2019-03-01/2019-03-01"))
    names = ("orography", "mask") if constants else ()
    return Samples(store, WINDOWS[kind], None, ["c", "a"], ["b", "c"], statistics, constants=names, order=order), fields


def slow_sample(samples: Samples, item: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Inputs, targets and lead of one item: float32, by the formula of the decoder."""
    store, window = samples.store, samples.window
    start, which = divmod(item, len(window.leads)) if window.by_lead else (item, None)
    hours = np.datetime64("1970-01-01T00") if "time" not in store.coords else store.coords["time"]
    first = -min(window.inputs)
    row = start + first  # hourly, without gaps: start number s is field s + first
    assert len(hours) > row
    inputs = [normalised(samples, row + offset, samples.input_channels) for offset in window.inputs]
    for name in samples.constants:
        values = store.constants[name].astype(np.float64)
        inputs.append(((values - values.mean()) / values.std()).astype(np.float32)[None])
    leads = window.leads if which is None else (window.leads[which],)
    if which is not None:
        inputs.append(np.full((1, *store.grid.shape), np.float32(leads[0]) / np.float32(100)))
    targets = [normalised(samples, row + lead, samples.target_channels) for lead in leads]
    return np.concatenate(inputs), np.concatenate(targets), 0 if which is None else leads[0]


def normalised(samples: Samples, row: int, channels: Sequence[str]) -> np.ndarray:
    store, statistics = samples.store, samples.statistics
    assert statistics is not None
    stored = store.read_stored([row], channels)[0].astype(np.float32)
    places = store.channel_indices(channels)
    scale, offset = (part[places][:, None, None] for part in (store.encoding.scale, store.encoding.offset))
    which = [statistics.channels.index(name) for name in channels]
    mean, std = (np.array(part)[which][:, None, None] for part in (statistics.mean, statistics.std))
    return (stored - ((mean - offset) / scale).astype(np.float32)) / (std / scale).astype(np.float32)


def assert_is(batch: Batch, samples: Samples) -> None:
    """Every sample of a batch is what it should be, to the bit."""
    for n, item in enumerate(batch.ids.tolist()):
        if item < 0:
            assert not batch.inputs[n].any()
            assert not batch.targets[n].any()
            continue
        inputs, targets, lead = slow_sample(samples, item)
        np.testing.assert_array_equal(batch.inputs[n].cpu().numpy(), inputs)
        np.testing.assert_array_equal(batch.targets[n].cpu().numpy(), targets)
        assert int(batch.leads[n]) == lead


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    pairs = (one.inputs, other.inputs), (one.targets, other.targets), (one.ids, other.ids), (one.leads, other.leads)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def wait_until(condition, seconds: float = 30.0) -> bool:  # type: ignore[no-untyped-def]
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


class CountedReads:
    """Counts how often each row of a store is read, by channel set."""

    def __init__(self, store: Store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
        self.reads: list[tuple[int, tuple[str, ...]]] = []
        read = type(store).read_stored

        def counted(this, rows, channels=None, out=None, check=False):  # type: ignore[no-untyped-def]
            self.reads += [(int(row), tuple(channels or ())) for row in rows]
            return read(this, rows, channels, out, check)

        monkeypatch.setattr(type(store), "read_stored", counted)
