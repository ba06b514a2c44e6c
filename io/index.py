"""``index.json``: what the files of a folder are, so that a missing, added or changed one is noticed at once.

It also keeps each file's digest, which would otherwise have to be gathered from all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io import layout
from smoe_hpc.io.atomic import write_text
from smoe_hpc.io.team import SOLO, Team, share

if TYPE_CHECKING:
    from smoe_hpc.io.fields import FieldReader
    from smoe_hpc.io.store import Store

INDEX = "index.json"
_FORMAT = 1
_REMEDY = "restore the file, or, if it is as it should be, write the index anew (`smoe-hpc data verify {} --index`)"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One file of the folder: name, bytes, time of its last change (ns), digest, samples, first and last of them."""

    name: str
    bytes: int
    changed_ns: int
    digest: str
    samples: int
    first: str
    last: str


@dataclass(frozen=True)
class Index:
    """The files of a folder in order, and what they share.

    Args:
        files: by their first sample.
        about: plain values for people and scripts: channels with their units, grid in words, stored type, hours between
            samples, whether the fields are synthetic.
    """

    files: tuple[Entry, ...]
    about: dict[str, Any]

    def require_size(self, folder: Path, number: int) -> None:
        """Raise unless a file is there and as large as it was.

        Raises:
            DataError: missing, or of another size.
        """
        entry, remedy = self.files[number], _REMEDY.format(folder)
        path = folder / entry.name
        if not path.exists():
            raise DataError(f"{path} is missing though {folder / INDEX} lists it; {remedy}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise DataError(f"{path} has {size} bytes, but {folder / INDEX} says {entry.bytes}; {remedy}")

    def not_listed(self, folder: Path) -> list[str]:
        """One sentence for each store file of the folder that the index does not list."""
        listed = {entry.name for entry in self.files}
        remedy = f"move it away, or write the index anew (`smoe-hpc data verify {folder} --index`)"
        return [
            f"{one} is not in {folder / INDEX}; {remedy}"
            for one in sorted(folder.glob("*" + layout.SUFFIX))
            if one.name not in listed
        ]

    def fits(self, store: Store, number: int) -> bool:
        """Whether a file has not changed since the index was written, so that its digest still holds."""
        entry = self.files[number]
        return store.stamp[:2] == (entry.bytes, entry.changed_ns)


def read_index(folder: str | Path) -> Index | None:
    """The index of a folder, None where there is none.

    Raises:
        DataError: a file of that name that is not an index.
    """
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(Entry(**entry) for entry in content.pop("files"))
        if content.pop("format") != _FORMAT:
            raise KeyError("format")
        return Index(files, content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"remove it, or write it anew (`smoe-hpc data verify {folder} --index`)"
        raise DataError(f"{path} is not an index of stores ({error}); {remedy}") from error


def write_index(folder: str | Path, team: Team = SOLO, progress: Progress | None = None) -> Index:
    """Write ``index.json`` for all store files of a folder; collective over the team, which shares the files.

    Returns:
        What was written, on every rank.

    Raises:
        DataError: no file, files that cannot be opened or do not belong together, a folder that cannot be written.
    """
    from smoe_hpc.io.series import Series, first_sample
    from smoe_hpc.io.store import Store

    folder = Path(folder)
    paths = sorted(folder.glob("*" + layout.SUFFIX))
    mine = share(len(paths), team)
    found: list[tuple[Entry, Store] | DataError] = []
    for number in mine:
        try:
            store = Store(paths[number])
            found.append((_entry(store), store))
        except DataError as error:  # raised together below: the others wait in the gather
            found.append(error)
        if progress is not None:
            progress(len(found), len(mine))
    everybody = [one for part in team.gather(found) for one in part]
    for one in everybody:
        if isinstance(one, DataError):
            raise one
    pairs = sorted(everybody, key=lambda pair: first_sample(pair[1]))
    series = Series([store for _, store in pairs], folder)
    index = Index(tuple(entry for entry, _ in pairs), _describe(series))
    failed: DataError | None = None
    if team.rank == 0:
        content = {"format": _FORMAT, **index.about, "files": [asdict(entry) for entry in index.files]}
        try:
            write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")
        except DataError as error:
            failed = error
    failed = next((one for one in team.gather(failed) if one is not None), None)
    if failed is not None:
        raise failed
    return index


def _entry(store: Store) -> Entry:
    if not store.num_samples:
        raise DataError(f"{store.path} holds no sample; remove it from the folder")
    first, last = (layout.describe_sample(store.coords, row) for row in (0, -1))
    size, changed, _ = store.stamp
    return Entry(store.path.name, size, changed, store.digest(), store.num_samples, first, last)


def _describe(store: FieldReader) -> dict[str, Any]:
    about: dict[str, Any] = {
        "channels": dict(zip(store.channels, store.units, strict=True)),
        "grid": store.grid.describe(),
        "stored_as": store.encoding.dtype,
        "samples": store.num_samples,
    }
    if "time" in store.coords and store.num_samples > 1:
        steps = np.diff(store.coords["time"]).astype(np.int64)
        about["step_hours"] = float(np.median(steps[steps > 0])) / 3600 if (steps > 0).any() else 0.0
    about["synthetic"] = layout.is_synthetic(store.attributes)
    return about
