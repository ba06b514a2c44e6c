"""Several store files, one after the other, read as if they were one.

A folder holds one file a year. A reader of samples should not have to know where a year ends: a series has the rows
of all its files in order, and everything that a store has. Files that do not belong together are refused when they are
opened, naming both, because a model would otherwise learn from two different worlds.

Dimensions: T samples of all files, n samples read.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.access.faults import faults_of
from smoe_hpc.io.access.formats import way_to_a_store
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.digest import combine_digests
from smoe_hpc.io.store.index import Index, read_index
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.io.store.reader import Store


class Series(FieldReader):
    """The samples of several stores in order; see :class:`~smoe_hpc.io.store.interface.FieldReader`.

    Args:
        stores: open stores, ascending in time (or in run and step), at least one.
        path: what the user called them: the folder or the pattern.

    Attributes:
        stores: the files.
        attributes: those that all files share, and whether they are synthetic.

    Raises:
        DataError: no file, or two that do not belong together (other grid, channels or their order, encoding,
            transforms, units, constants, real beside synthetic; an hour in both; out of order), naming both.
    """

    def __init__(self, stores: Sequence[Store], path: str | Path) -> None:
        if not stores:
            raise DataError(f"{path} holds no store; give a folder with .h5 files, or one file")
        self.path, self.stores = Path(path), list(stores)
        first = self.stores[0]
        for store in self.stores[1:]:
            _require_alike(first, store)
        for before, after in zip(self.stores, self.stores[1:], strict=False):
            _require_after(before, after)
        self.grid, self.channels, self.units = first.grid, first.channels, first.units
        self.transforms, self.encoding, self.constants = first.transforms, first.encoding, first.constants
        self.coords = {name: np.concatenate([store.coords[name] for store in self.stores]) for name in first.coords}
        self.attributes = {
            name: value
            for name, value in first.attributes.items()
            if all(np.array_equal(store.attributes.get(name), value) for store in self.stores)
        }
        if layout.is_synthetic(first.attributes) and not layout.is_synthetic(self.attributes):
            self.attributes[layout.SYNTHETIC] = "yes"  # said in other words by each file
        counts = [store.num_samples for store in self.stores]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # [files + 1]
        self.num_samples = int(self._starts[-1])

    @property
    def direct(self) -> bool:
        """Whether samples are read at their offsets in every file, without HDF5's lock."""
        return all(store.direct for store in self.stores)

    @property
    def folder(self) -> Path:
        """Where the first file lies."""
        return self.stores[0].folder

    def digest(self) -> str:
        """A sha256 of the digests of all files, in order."""
        return combine_digests(store.digest() for store in self.stores)

    def _locate(self, row: int) -> tuple[Store, int]:
        """The file that holds a row, and the row's number there."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.stores[number], int(row - self._starts[number])

    def describe_row(self, row: int) -> str:
        """The file and the sample's time, or its run and step."""
        store, own_row = self._locate(row)
        return store.describe_row(own_row)

    def _fill(self, rows: np.ndarray, indices: Sequence[int], out: np.ndarray, entries: np.ndarray, check: bool) -> None:
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            self.stores[number]._fill(rows[here] - self._starts[number], indices, out, entries[here], check)

    def close(self) -> None:
        """Let go of all files; a later read opens them again."""
        for store in self.stores:
            store.close()


Fields = Store | Series


def open_store(path: str | Path, verify: str = "off") -> Fields:
    """Open what a user names: a store file, a folder of them or a pattern such as ``data/era5_19*.h5``.

    In a folder with an index the indexed files are opened, and there may be no others; otherwise every
    ``.h5`` file, by their first sample (what a crash left, ``.h5.partial``, is not one).

    Raises:
        DataError: nothing there, a file that cannot be opened, that is not the one in the index or not in it, or that
            does not belong to the others.
    """
    path = Path(path)
    with faults_of(path):
        index = read_index(path) if path.is_dir() else None
        complaints = index.not_listed(path) if index else []
    for complaint in complaints:
        raise DataError(complaint)
    paths = [path / entry.name for entry in index.files] if index else store_files(path)
    if paths == [path]:
        return Store(path, verify)
    return _open_all(paths, path, verify, index)


def store_files(path: Path) -> list[Path]:
    """The store files that a path means, by name: all of a folder, those that fit a pattern, or the file itself.

    Raises:
        DataError: a folder without any, a pattern that none fits.
        UnreadableError: a folder that the system does not list.
    """
    with faults_of(path):
        return _store_files(path)


def _store_files(path: Path) -> list[Path]:
    if path.is_dir():
        os.listdir(path)  # glob takes a folder that it may not list for an empty one
        paths = sorted(path.glob("*" + layout.SUFFIX))
        if not paths:
            raise DataError(f"{path} holds no store (*{layout.SUFFIX}); {way_to_a_store(path)}")
        return paths
    if glob.has_magic(str(path)) and not path.exists():
        paths = sorted(Path(name) for name in glob.glob(str(path)))
        if not paths:
            raise DataError(f"no file fits the pattern {path}; check it, or give a folder")
        return paths
    return [path]


def _open_all(paths: list[Path], path: Path, verify: str, index: Index | None) -> Fields:
    stores = []
    for number, one in enumerate(paths):
        if index is not None:
            index.require_size(path, number)
        store = Store(one, verify)
        if index is not None and index.fits(number, *store.stamp[:2]):
            store.remember_digest(index.files[number].digest)
        stores.append(store)
    stores.sort(key=first_sample)
    return stores[0] if len(stores) == 1 else Series(stores, path)


def _key(store: Store, row: int) -> tuple[int, ...]:
    return tuple(int(store.coords[name][row].astype(np.int64)) for name in layout.COORDINATES if name in store.coords)


def first_sample(store: Store) -> tuple[int, ...]:
    """What files are ordered by: the time, or run and step, of the first sample; nothing for an empty file."""
    return _key(store, 0) if store.num_samples else ()


def _require_alike(first: Store, store: Store) -> None:
    """Raise unless the files belong to one series."""
    both = f"{first.path} and {store.path}"
    try:
        first.grid.require_same(store.grid, str(store.path))
    except DataError as error:
        raise DataError(f"{both} cannot be read as one: {error}") from error
    if first.channels != store.channels:
        same = sorted(first.channels) == sorted(store.channels)
        index = next((i for i, (a, b) in enumerate(zip(first.channels, store.channels, strict=False)) if a != b), -1)
        if same:
            how = f"in another order (channel {index} is {first.channels[index]!r} and {store.channels[index]!r})"
        else:
            how = f"others ({', '.join(sorted(set(first.channels) ^ set(store.channels)))} in only one of them)"
        raise DataError(f"{both} cannot be read as one: their channels are {how}; write them again with the same channels")
    for name in ("units", "transforms"):
        for channel, ours, theirs in zip(first.channels, getattr(first, name), getattr(store, name), strict=True):
            if ours != theirs:
                raise DataError(
                    f"{both} cannot be read as one: channel {channel!r} has {name} {ours!r} and {theirs!r}; write them alike"
                )
    if not first.encoding.same_as(store.encoding):
        how = f"{first.encoding.dtype} and {store.encoding.dtype}, or with other scales and offsets"
        raise DataError(f"{both} cannot be read as one: they are stored as {how}; write them with one encoding")
    names = [set(one.constants) for one in (first, store)]
    different = names[0] ^ names[1] or {n for n in names[0] if not np.array_equal(first.constants[n], store.constants[n])}
    if different:
        raise DataError(
            f"{both} cannot be read as one: their constants differ ({', '.join(sorted(different))}); write them alike"
        )
    if set(first.coords) != set(store.coords):
        how = f"by {', '.join(first.coords)} and by {', '.join(store.coords)}"
        raise DataError(f"{both} cannot be read as one: their samples are named {how}; keep them in folders of their own")
    if layout.is_synthetic(first.attributes) != layout.is_synthetic(store.attributes):
        raise DataError(f"{both} cannot be read as one: one is synthetic and one is not; keep them in folders of their own")


def _require_after(before: Store, after: Store) -> None:
    """Raise unless all samples of one file come before those of the other."""
    if not (before.num_samples and after.num_samples):
        empty = after if before.num_samples else before
        raise DataError(f"{empty.path} holds no sample; remove it from the folder")
    if _key(before, -1) < _key(after, 0):
        return
    both = f"{before.path} and {after.path}"
    mine, theirs = ([_key(store, row) for row in range(store.num_samples)] for store in (before, after))
    shared = sorted(set(mine) & set(theirs))
    if shared:
        twice = layout.describe_sample(before.coords, mine.index(shared[0]))
        raise DataError(f"{both} both hold {twice} ({len(shared)} such samples in all); remove one file, or write them apart")
    first = layout.describe_sample(after.coords, 0)
    raise DataError(f"{both} are out of order: {first} of the second comes before the end of the first; write them apart")
