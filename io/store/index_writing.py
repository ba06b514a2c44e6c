"""Writing ``index.json``: all files of a folder opened, held against each other and written down.

:mod:`smoe_hpc.io.store.index` says what an index is, and reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.files.beside import open_up
from smoe_hpc.files.writing import write_result
from smoe_hpc.io.communicator import SINGLE_PROCESS, Communicator, share
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.index import FORMAT, INDEX, Entry, Index
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.io.store.multi_file import Series, first_sample
from smoe_hpc.io.store.reader import Store
from smoe_hpc.progress import Progress


def write_index(folder: str | Path, communicator: Communicator = SINGLE_PROCESS, progress: Progress | None = None) -> Index:
    """Write ``index.json`` for all store files of a folder; collective over the communicator, which shares the files.

    Returns:
        What was written, on every rank.

    Raises:
        DataError: no file, files that cannot be opened or do not belong together, a folder that cannot be written.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*" + layout.SUFFIX))
    mine = share(len(paths), communicator)
    found: list[tuple[Entry, Store] | DataError] = []
    for number in mine:
        try:
            store = Store(paths[number])
            found.append((_entry(store), store))
        except DataError as error:  # raised together below: the others wait in the gather
            found.append(error)
        if progress is not None:
            progress(len(found), len(mine))
    everybody = [one for part in communicator.gather(found) for one in part]
    for one in everybody:
        if isinstance(one, DataError):
            raise one
    pairs = sorted(everybody, key=lambda pair: first_sample(pair[1]))
    series = Series([store for _, store in pairs], folder)
    index = Index(tuple(entry for entry, _ in pairs), _describe(series))
    failed: DataError | None = None
    if communicator.rank == 0:
        content = {"format": FORMAT, **index.about, "files": [asdict(entry) for entry in index.files]}
        try:
            write_result(folder / INDEX, json.dumps(content, indent=1) + "\n")
            open_up(folder / INDEX)
        except DataError as error:
            failed = error
    failed = next((one for one in communicator.gather(failed) if one is not None), None)
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
