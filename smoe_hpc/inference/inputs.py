"""The fields that forecasts start from: which rows hold them, and the network's input made of them.

A store and an xarray Dataset are read alike. No truth is asked for: a start needs the fields at its offsets, nothing after.

Dimensions: n starts, I offsets, U distinct fields, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.loading.decoding import Scaling, scaling_of
from smoe_hpc.io.sampling.coordinates import axis_of, starts_on_axis
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.store import transforms
from smoe_hpc.io.store.encoding import Encoding
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.runs.description import Description

if TYPE_CHECKING:
    import xarray


class Inputs(ABC):
    """Fields by row, normalised as a network wants them.

    Args:
        about: of the network.
        where: what errors call the data.
        grid: of the data.
        coords: ``time`` [T] or ``run`` and ``step`` [T], of the fields.

    Raises:
        DataError: another grid, runs where times are wanted, or times where runs are.
    """

    def __init__(self, about: Description, where: str, grid: Grid, coords: Mapping[str, np.ndarray]) -> None:
        about.grid.require_same(grid, where)
        if about.axis not in coords:
            wanted = "times" if about.axis == "time" else "runs and steps"
            raise DataError(f"{where} has {', '.join(coords)}, but the network forecasts from {wanted}; give other data")
        self.about, self.where = about, where
        self.coords = {name: np.asarray(coords[name]) for name in (("time",) if about.axis == "time" else ("run", "step"))}
        self._reach = max(map(abs, about.offsets))
        self._codes, self._unit = axis_of(self.coords, self._reach)
        self._sorted = np.argsort(self._codes, kind="stable")

    @abstractmethod
    def read(self, rows: np.ndarray) -> Tensor:
        """Normalised input channels [U, C, H, W] float32 of fields by row."""

    def all_starts(self) -> list[Any]:
        """Every start whose inputs are there, in order: datetime64, or (run, step).

        Raises:
            DataError: there is none.
        """
        rows = self._rows(self._codes)
        found = np.flatnonzero((rows >= 0).all(axis=1))
        if not len(found):
            raise DataError(f"{self.where} has no start with fields at offsets {self._offsets_in_words()}; give other data")
        values = [self.coords[name][found] for name in self.coords]
        return list(values[0]) if len(values) == 1 else list(zip(*(part.tolist() for part in values), strict=True))

    def rows_of(self, starts: Sequence[Any]) -> np.ndarray:
        """[n, I] row of each input field of each start.

        Raises:
            DataError: a field that is not there; it names the start and the field.
        """
        if self.about.axis == "time":
            wanted = np.array(starts, dtype="datetime64[s]")
        else:
            wanted = np.array(starts, dtype=np.int64).reshape(-1, 2)
        rows = self._rows(starts_on_axis(self.coords, wanted, self._reach))
        missing = np.argwhere(rows < 0)
        if len(missing):
            start, offset = missing[0].tolist()
            raise DataError(
                f"{self.where} has no field {self._in_words(wanted[start], offset)}, which the start "
                f"{self._in_words(wanted[start], None)} needs (offsets {self._offsets_in_words()}); it has {self._extent()}"
            )
        return rows

    def _rows(self, codes: np.ndarray) -> np.ndarray:
        """[n, I]; -1 where a field is not there."""
        wanted = codes[:, None] + np.array(self.about.offsets, dtype=np.int64) * self._unit
        if not len(self._codes):
            return np.full(wanted.shape, -1)
        place = np.minimum(np.searchsorted(self._codes, wanted, sorter=self._sorted), len(self._codes) - 1)
        rows = self._sorted[place]
        return np.where(self._codes[rows] == wanted, rows, -1)

    def _in_words(self, start: np.ndarray, offset: int | None) -> str:
        shift = 0 if offset is None else self.about.offsets[offset]
        if self.about.axis == "time":
            return str((start + np.timedelta64(shift, "h")).astype("datetime64[m]"))
        return f"run {start[0]} step {start[1] + shift}"

    def _offsets_in_words(self) -> str:
        return f"{', '.join(map(str, self.about.offsets))} {'h' if self.about.axis == 'time' else 'steps'}"

    def _extent(self) -> str:
        if not len(self._codes):
            return "none"
        first, last = self._sorted[0], self._sorted[-1]
        ends = [" ".join(f"{name} {values[row]}" for name, values in self.coords.items()) for row in (first, last)]
        return f"{len(self._codes)} fields, {ends[0]} to {ends[1]}"


class StoreInputs(Inputs):
    """From a store.

    Raises:
        DataError: as `Inputs`; a channel that is not there, or that has other units or another transform.
    """

    def __init__(self, store: FieldReader, about: Description) -> None:
        super().__init__(about, str(store.path), store.grid, store.coords)
        self._store, self._names = store, [channel.name for channel in about.inputs]
        places = store.channel_indices(self._names)
        for channel, place in zip(about.inputs, places, strict=True):
            _require_alike(self.where, channel.name, "units", channel.units, store.units[place])
            _require_alike(self.where, channel.name, "transform", channel.transform, store.transforms[place])
        self._scaling = _scaling(store.encoding.select(places), about)

    def read(self, rows: np.ndarray) -> Tensor:
        """See `Inputs.read`; the same numbers, to the bit, as training and evaluation read."""
        return _normalised(torch.from_numpy(self._store.read_stored(rows, self._names)), self._scaling)


class DatasetInputs(Inputs):
    """From a Dataset of physical values, as `open_dataset` gives it (``fields``) or with a variable a channel.

    Raises:
        DataError: as `StoreInputs`.
    """

    def __init__(self, dataset: xarray.Dataset, about: Description) -> None:
        where = "the dataset"
        names = {"lat": "latitude", "lon": "longitude"}
        axes = [short if short in dataset.coords else names[short] for short in names]
        for name in axes:
            if name not in dataset.coords:
                raise DataError(f"{where} has no coordinate {name!r}; give one as open_dataset returns it")
        self._dataset = dataset.sortby(axes[0])
        grid = Grid(about.grid.kind, *(self._dataset[name].values for name in axes))
        coords = {name: dataset[name].values for name in ("time", "run", "step") if name in dataset.coords}
        super().__init__(about, where, grid, coords)
        self._axes = axes
        self._stacked = "fields" in dataset and "channel" in dataset.coords
        there = set(map(str, dataset["channel"].values)) if self._stacked else set(map(str, dataset.data_vars))
        for channel in about.inputs:
            if channel.name not in there:
                raise DataError(f"{where} has no channel {channel.name!r}; it has {', '.join(sorted(there))}")
            units = self._units(channel.name)
            _require_alike(where, channel.name, "units", channel.units, channel.units if units is None else units)
        self._scaling = _scaling(Encoding.identity(len(about.inputs)), about)

    def _units(self, name: str) -> str | None:
        if not self._stacked:
            return self._dataset[name].attrs.get("units")
        return str(self._dataset["units"].sel(channel=name).values) if "units" in self._dataset.coords else None

    def read(self, rows: np.ndarray) -> Tensor:
        """See `Inputs.read`."""
        along = "time" if self.about.axis == "time" else "sample"
        found = np.empty((len(rows), len(self.about.inputs), *self.about.grid.shape), dtype=np.float32)
        for place, channel in enumerate(self.about.inputs):
            array = self._dataset["fields"].sel(channel=channel.name) if self._stacked else self._dataset[channel.name]
            values = array.isel({along: rows}).transpose(along, *self._axes).values.astype(np.float32)
            found[:, place] = values if channel.transform == transforms.NONE else transforms.apply(channel.transform, values)
        return _normalised(torch.from_numpy(found), self._scaling)


def open_inputs(data: Any, about: Description) -> Inputs:
    """Inputs from a store, the path of one, or an xarray Dataset.

    Raises:
        DataError: data that are missing or damaged, or do not fit the network.
    """
    from smoe_hpc.io.store.multi_file import open_store

    if isinstance(data, FieldReader):
        return StoreInputs(data, about)
    if hasattr(data, "data_vars"):
        return DatasetInputs(data, about)
    if not isinstance(data, (str, os.PathLike)):
        raise DataError(f"data is a {type(data).__name__}; give a store, the path of one, or an xarray Dataset")
    return StoreInputs(open_store(os.fspath(data)), about)


def assemble(fields: Tensor, rows: np.ndarray, distinct: np.ndarray, constants: Tensor | None, more: int) -> Tensor:
    """The network's input [n, I * C + K + more, H, W]: input fields oldest first, constants, and ``more`` channels of zeros.

    Args:
        fields: [U, C, H, W] of the distinct rows.
        rows: [n, I].
        distinct: [U], sorted.
        constants: [K, H, W] or None.
        more: channels at the end.
    """
    chosen = torch.from_numpy(np.searchsorted(distinct, rows))
    inputs = fields[chosen].flatten(1, 2)
    parts = [inputs]
    if constants is not None:
        parts.append(constants.expand(len(rows), *constants.shape))
    if more:
        parts.append(inputs.new_zeros(len(rows), more, *inputs.shape[-2:]))
    return torch.cat(parts, dim=1) if len(parts) > 1 else inputs


def _scaling(encoding: Encoding, about: Description) -> Scaling:
    numbers = [(channel.mean, channel.std, channel.transform) for channel in about.inputs]
    names = [channel.name for channel in about.inputs]
    mean, std, kinds = zip(*numbers, strict=True)
    return scaling_of(encoding, Statistics(tuple(names), mean, std, 0, "", kinds), names)


def _normalised(stored: Tensor, scaling: Scaling) -> Tensor:
    """In float32, as `Decoder` does it."""
    if scaling is None:
        return stored.float()
    return torch.sub(stored, scaling[0]).div_(scaling[1])


def _require_alike(where: str, name: str, what: str, ours: str, theirs: str) -> None:
    if ours != theirs:
        raise DataError(
            f"{where}: {what} of channel {name!r} is {theirs!r}, the network learned from {ours!r}; convert it first"
        )
