"""Store files for tests: written, damaged, and stored otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np

from smoe_hpc.io import Grid, Store, StoreWriter

from .conftest import hourly

CHANNELS = ("a", "b", "c")
GRID = Grid("latlon", [50, 51, 52, 53], [0, 5, 10, 15, 20])


def write(path: Path, fields: np.ndarray, start: str, **changed: object) -> Store:
    """A file of hourly fields [T, 3, 4, 5] from ``start``."""
    options: dict = {"grid": GRID, "channels": CHANNELS, "units": ["K"] * 3, "coords": {"time": hourly(len(fields), start)}}
    options |= {"constants": {"land": np.ones((4, 5))}, **changed}
    with StoreWriter(path, **options) as writer:
        writer.write(0, fields)
    return Store(path)


def flip_bit(store: Store, row: int) -> None:
    """Change one bit of a sample, and leave size and times as they were: what a bad disk does."""
    with h5py.File(store.path) as file:
        chunk = file["fields"].id.get_chunk_info_by_coord((row, 0, 0, 0))
    before = store.path.stat()
    with store.path.open("r+b") as file:
        file.seek(chunk.byte_offset + 7)
        byte = file.read(1)[0]
        file.seek(chunk.byte_offset + 7)
        file.write(bytes([byte ^ 4]))
    os.utime(store.path, ns=(before.st_atime_ns, before.st_mtime_ns))


def compressed_copy(store: Store, **filters: object) -> Store:
    """The same store with its fields stored otherwise, as a later writer or h5repack might."""
    path = store.path.with_name("compressed.h5")
    with h5py.File(store.path) as source, h5py.File(path, "w") as copy:
        copy.attrs.update(source.attrs)
        for name in source:
            if name != "fields":
                source.copy(name, copy)
        fields = source["fields"]
        copy.create_dataset("fields", data=fields[:], chunks=fields.chunks, **filters)
    return Store(path)
