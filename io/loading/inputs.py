"""Inputs without truth: what a model needs for a forecast of any start whose input fields are stored.

Dimensions: B starts, I input fields, C channels, K constants, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.constants import normalised_constants
from smoe_hpc.io.loading.decoding import Decoder, scaling_of
from smoe_hpc.io.loading.fetching import fetch
from smoe_hpc.io.loading.frames import FrameTable
from smoe_hpc.io.sampling.windows import Window, input_rows_at
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.store.interface import FieldReader


def input_batch(
    store: FieldReader,
    statistics: Statistics | None,
    window: Window,
    channels: Sequence[str],
    constants: Sequence[str],
    starts: np.ndarray,
    *,
    lead: int | None = None,
    grid: Grid | None = None,
) -> Batch:
    """The inputs of given starts, to the bit those of `Samples` with the same settings; ``targets`` is [B, 0, H, W].

    Args:
        store: the data; nothing but the inputs need be there.
        statistics: what normalises the channels; None leaves them in their units.
        window: which input fields a start needs, and what its leads are.
        channels: C names, in the model's order.
        constants: K names, likewise.
        starts: [B] datetime64; [B, 2] run and step where samples are named so.
        lead: which of the window's leads is wanted, where each sample has one of its own (`Window.by_lead`).
        grid: which grid the model stands on, to be checked; any when None.

    Raises:
        DataError: a start whose inputs are not all stored, a channel or constant that the store lacks, another grid, a
            channel that was transformed otherwise than in the statistics, a lead that the window does not have.
    """
    if grid is not None:
        grid.require_same(store.grid, str(store.path))
    indices = store.channel_indices(channels)
    if statistics is not None:
        _require_transforms(store, statistics, channels)
    scaling = scaling_of(store.encoding.select(indices), statistics, channels)
    fields = normalised_constants(store, constants)
    starts = np.asarray(starts)
    try:
        rows = input_rows_at(store.coords, window, starts)
    except DataError as error:
        raise DataError(f"{store.path}: {error}") from error
    table = FrameTable(store, window, rows, np.zeros((len(rows), 0), dtype=np.int64), list(channels), [])
    return fetch(table, Decoder(table, scaling, None, fields), _ids(len(rows), window, lead))


def _ids(count: int, window: Window, lead: int | None) -> np.ndarray:
    """Of all starts, with one lead."""
    ids = np.arange(count, dtype=np.int64)
    if not window.by_lead:
        return ids
    if lead not in window.leads:
        raise DataError(f"lead {lead} is not one of the window's: {', '.join(map(str, window.leads))}; give one of these")
    return ids * len(window.leads) + window.leads.index(lead)


def _require_transforms(store: FieldReader, statistics: Statistics, channels: Sequence[str]) -> None:
    """Raise unless the store holds channels as the statistics were taken of them."""
    known = statistics.channel_indices(channels), store.channel_indices(channels)
    for name, of_statistics, of_store in zip(channels, *known, strict=True):
        expected, stored = statistics.transforms[of_statistics], store.transforms[of_store]
        if expected != stored:
            raise DataError(
                f"the statistics of {name!r} are of transform {expected!r}, but {store.path} holds {stored!r}; write the store "
                f"with {expected!r}"
            )
