"""Is the data whole? Every checksum is verified, every value is checked, every time and file is accounted for.

The work is shared by a communicator: each rank takes a stretch of all samples. What is found is the same for any communicator.

Dimensions: C channels, H latitude rows, W longitude columns, R ranks.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.access.faults import UnreadableError, faults_of
from smoe_hpc.io.checks.quantisation import Quantisation, Rounding, merge_rounding
from smoe_hpc.io.communicator import SINGLE_PROCESS, Communicator, share
from smoe_hpc.io.finite import NotFinitePlace, find_not_finite
from smoe_hpc.io.sampling.gaps import Gap, find_gaps
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.index import INDEX, Entry, Index, read_index
from smoe_hpc.io.store.multi_file import Series, first_sample, store_files
from smoe_hpc.io.store.reader import Store
from smoe_hpc.progress import Progress

_SAMPLED = 64  # samples that the rounding is estimated from


@dataclass(frozen=True)
class Damage:
    """A sample that cannot be trusted: its file, row and name (time, or run and step), and what is wrong."""

    file: str
    row: int
    sample: str
    error: str


@dataclass(frozen=True)
class NotFinite:
    """Values of one channel of one sample that are NaN or infinite: how many, and where the first stands (degrees)."""

    file: str
    row: int
    sample: str
    channel: str
    lat: float
    lon: float
    count: int


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        path: what was checked.
        files: how many.
        samples: how many in all.
        bytes: of all files.
        synthetic: whether the fields were made up.
        unusable: files that cannot be opened or do not belong together, one sentence each.
        damaged: samples whose bytes do not fit their checksum.
        not_finite: NaN and infinity, one entry a sample and channel.
        index: where the folder and its index contradict each other, one sentence each.
        unread: files that the system did not give, wholly or in part (no permission, no descriptor left, a server that fails),
            one sentence each: nothing is known to be wrong with them.
        unchecked: files without checksums (another tool wrote them), in which damage cannot be seen.
        gaps: times that are missing; no damage, but windows end there.
        quantisation: by channel, what storing it in fewer bits costs; empty for float32.
    """

    path: str
    files: int
    samples: int
    bytes: int
    synthetic: bool
    unusable: tuple[str, ...] = ()
    damaged: tuple[Damage, ...] = ()
    not_finite: tuple[NotFinite, ...] = ()
    index: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    quantisation: dict[str, Quantisation] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all of it was read and can be trusted."""
        return not (self.unusable or self.damaged or self.not_finite or self.index or self.unread)

    def problems(self) -> list[str]:
        """One sentence for each thing that is wrong, naming file, time and, where there is one, channel."""
        damaged = [f"{one.error}" for one in self.damaged]
        not_finite = [
            f"{one.file} {one.sample} (row {one.row}), {NotFinitePlace(one.channel, one.lat, one.lon, one.count)}; "
            "fill them at the source and write the file again"
            for one in self.not_finite
        ]
        return [*self.unusable, *damaged, *not_finite, *self.index]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class _Part:
    """What one rank found."""

    damaged: list[Damage]
    not_finite: list[NotFinite]
    index: list[str]
    unread: list[str]
    rounding: dict[str, Rounding]


def verify(path: str | Path, communicator: Communicator = SINGLE_PROCESS, progress: Progress | None = None) -> Report:
    """Check everything that a store file, a folder or a pattern of them holds; collective over the communicator.

    Damage is reported, not raised; so is what could not be read, apart from it.

    Args:
        path: what :func:`~smoe_hpc.io.store.multi_file.open_store` takes. All files of a folder are checked, indexed or not.
        communicator: who shares the work.
        progress: called with (samples done, samples in all) of this rank.

    Returns:
        The report, the same on every rank.

    Raises:
        DataError: nothing there.
        UnreadableError: a folder that the system does not list.
    """
    path = Path(path)
    with faults_of(path):
        index, complaints, unread = _read_index(path)
        paths = store_files(path)
        if paths == [path] and not path.exists():
            raise DataError(f"{path} does not exist; give a store file, a folder of them or a pattern")
    stores, unusable, size = [], [], 0
    for one in paths:
        with contextlib.suppress(OSError):  # a link that leads nowhere: not a store either
            size += one.stat().st_size
        try:
            stores.append(Store(one))
        except UnreadableError as error:
            unread.append(str(error))
        except DataError as error:
            unusable.append(str(error))
    everywhere = set.intersection(*communicator.gather({store.path for store in stores}))  # or ranks would share other samples
    stores = sorted((store for store in stores if store.path in everywhere), key=first_sample)
    synthetic = any(layout.is_synthetic(store.attributes) for store in stores)
    times = [store.coords["time"] for store in stores if "time" in store.coords]
    try:
        alike = Series(stores, path).num_samples > 0 if stores else False
    except DataError as error:
        alike = False
        unusable.append(str(error))
    rounded = alike and stores[0].encoding.dtype != "float32"
    mine = _look(stores, index, communicator, rounded, progress)
    mine.unread.extend(unread)
    parts = communicator.gather(mine)
    quantisation = merge_rounding([part.rounding for part in parts], stores[0]) if rounded else {}
    for store in stores:
        store.close()
    return Report(
        path=str(path),
        files=len(paths),
        samples=sum(store.num_samples for store in stores),
        bytes=size,
        synthetic=synthetic,
        unusable=tuple(unusable),
        damaged=tuple(one for part in parts for one in part.damaged),
        not_finite=tuple(one for part in parts for one in part.not_finite),
        index=(*complaints, *(one for part in parts for one in part.index)),
        unread=tuple(sorted({one for part in parts for one in part.unread})),
        unchecked=tuple(str(store.path) for store in stores if not store.has_checksums),
        gaps=tuple(find_gaps(np.concatenate(times))) if alike and times else (),
        quantisation=quantisation,
    )


def _read_index(path: Path) -> tuple[Index | None, list[str], list[str]]:
    """The index of a folder; where the names and sizes of its files are others than it says; what could not be read."""
    complaints: list[str] = []
    unread: list[str] = []
    if not path.is_dir():
        return None, complaints, unread
    try:
        index = read_index(path)
    except DataError as error:
        (unread if isinstance(error, UnreadableError) else complaints).append(str(error))
        return None, complaints, unread
    if index is None:
        return None, complaints, unread
    for number in range(len(index.files)):
        try:
            index.require_size(path, number)
        except DataError as error:
            (unread if isinstance(error, UnreadableError) else complaints).append(str(error))
    complaints += index.not_listed(path)
    return index, complaints, unread


def _look(
    stores: list[Store], index: Index | None, communicator: Communicator, rounded: bool, progress: Progress | None
) -> _Part:
    """This rank's stretch of all samples, and its share of the digests."""
    part = _Part([], [], [], [], {})
    entries = {entry.name: entry for entry in index.files} if index else {}
    for number in share(len(stores), communicator):
        try:
            complaint = _compare(stores[number], entries.get(stores[number].path.name))
        except UnreadableError as error:
            part.unread.append(str(error))
        else:
            part.index.extend([] if complaint is None else [complaint])
    starts = np.cumsum([0, *(store.num_samples for store in stores)])
    stride = max(1, -(-int(starts[-1]) // _SAMPLED))
    mine = share(int(starts[-1]), communicator)
    for done, row in enumerate(mine, start=1):
        number = int(np.searchsorted(starts, row, side="right")) - 1
        store, own_row = stores[number], row - int(starts[number])
        try:
            stored = store.read_stored([own_row], check=True)[0]
        except UnreadableError as error:
            part.unread.append(str(error))
        except DataError as error:
            sample = layout.describe_sample(store.coords, own_row)
            part.damaged.append(Damage(str(store.path), own_row, sample, str(error)))
        else:
            bad = _not_finite(store, own_row, stored)
            part.not_finite.extend(bad)
            if rounded and row % stride == 0 and not bad:
                Rounding.add_sample(part.rounding, store, stored)
        if progress is not None:
            progress(done, len(mine))
    return part


def _compare(store: Store, entry: Entry | None) -> str | None:
    """What is wrong where a file of the listed size has another digest."""
    if entry is None or entry.bytes != store.stamp[0]:
        return None
    try:
        if entry.digest == store.digest():
            return None
    except UnreadableError:
        raise
    except DataError as error:
        return str(error)
    return (
        f"{store.path} holds something else than when {INDEX} was written, though its size is the same; "
        f"restore it, or write the index anew (`smoe-hpc data verify {store.folder} --index`)"
    )


def _not_finite(store: Store, row: int, stored: np.ndarray) -> list[NotFinite]:
    """Of one sample [C, H, W] as it is stored."""
    sample = layout.describe_sample(store.coords, row)
    found = find_not_finite(stored, store.channels, store.grid)
    return [NotFinite(str(store.path), row, sample, one.channel, one.lat, one.lon, one.count) for one in found]
