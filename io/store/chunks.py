"""Where the samples of a store lie in its file, and which filters stand before them.

Every sample is one chunk. A chunk without compression lies in the file as it is, 4 bytes of checksum (fletcher32)
behind it, and can be read at its offset; others go through HDF5.

Dimensions: T samples of the store.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.names import known_names
from smoe_hpc.io.store import layout

_NAMES = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32015: "zstd"}
_PLUGINS = ("zstd", "lz4", "blosc")
COMPRESSIONS = ("gzip", *_PLUGINS)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a store, by row.

    Args:
        offsets: [T] int64, first byte in the file.
        sizes: [T] int64, bytes in the file, the checksum included.
        checksums: whether each ends in its 4 bytes of fletcher32.
        verbatim: whether a chunk is the sample as it is (and that checksum).
    """

    offsets: np.ndarray
    sizes: np.ndarray
    checksums: bool
    verbatim: bool


def filter_names(fields: h5py.Dataset) -> list[str]:
    """What a chunk passes on its way to the file, in order, e.g. ``["shuffle", "zstd", "fletcher32"]``."""
    filters = fields.id.get_create_plist()
    codes = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
    return [_NAMES.get(code, f"filter {code}") for code in codes]


def require_filters(path: Path, fields: h5py.Dataset) -> None:
    """Load what decompresses the fields, where HDF5 itself cannot.

    Raises:
        DataError: a compressor that is not installed.
    """
    filters = fields.id.get_create_plist()
    codes = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
    missing = [code for code in codes if not h5py.h5z.filter_avail(code)]
    if missing:
        names = ", ".join(_NAMES.get(code, f"filter {code}") for code in missing)
        _load_plugins(f"{path} is compressed with {names}")
        for code in missing:
            if not h5py.h5z.filter_avail(code):
                raise DataError(f"{path} is compressed with {names}, which hdf5plugin does not know; repack it (h5repack)")


def compression_options(compression: str | None) -> dict[str, object]:
    """What h5py's ``create_dataset`` takes for a compression of ``COMPRESSIONS``.

    Raises:
        DataError: an unknown one, or one whose package is not installed.
    """
    if compression is None:
        return {}
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    if compression not in _PLUGINS:
        raise DataError(f"compression {compression!r} is unknown; {known_names(compression, COMPRESSIONS)}")
    plugin = _load_plugins(f"compression {compression!r} was asked for")
    if compression == "blosc":
        return dict(plugin.Blosc(cname="zstd", clevel=3, shuffle=plugin.Blosc.SHUFFLE))  # type: ignore[attr-defined]
    kind = plugin.Zstd(clevel=3) if compression == "zstd" else plugin.LZ4()  # type: ignore[attr-defined]
    return {**kind, "shuffle": True}


def _load_plugins(why: str) -> object:
    try:
        return importlib.import_module("hdf5plugin")
    except ImportError as error:
        raise DataError(f"{why}, but hdf5plugin is not installed; pip install 'smoe-hpc[convert]'") from error


def find_chunks(path: Path, fields: h5py.Dataset) -> Chunks | None:
    """The chunks of the fields, or None where chunks are not single samples.

    Raises:
        DataError: a sample without a chunk, one that would lie beyond the end of the file, or one of another size.
    """
    if fields.chunks != (1, *fields.shape[1:]):
        return None
    names = filter_names(fields)
    offsets, sizes = np.full((2, fields.shape[0]), -1, dtype=np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        row = chunk.chunk_offset[0]
        offsets[row], sizes[row] = chunk.byte_offset, chunk.size

    fields.id.chunk_iter(note)
    if (offsets < 0).any():
        raise DataError(f"{path} lacks sample {int(np.argmin(offsets >= 0))} of {len(offsets)}; write the store again")
    if len(offsets) and int((offsets + sizes).max()) > path.stat().st_size:
        raise layout.truncated(path)
    checksums, verbatim = names[-1:] == ["fletcher32"], set(names) <= {"fletcher32"}
    whole = math.prod(fields.chunks) * fields.dtype.itemsize + layout.CHECKSUM_BYTES * checksums
    if verbatim and (sizes != whole).any():  # without its checksum, say, which a chunk may be marked to lack
        row = int(np.argmax(sizes != whole))
        raise DataError(f"{path}: sample {row} is stored in {sizes[row]} bytes instead of {whole}; write the store again")
    return Chunks(offsets, sizes, checksums, verbatim)


def read_fully(path: Path, descriptor: int, target: memoryview, offset: int) -> None:
    """Piece by piece: a signal or a network file system may cut a read short; at the file's end nothing comes."""
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:]], offset + done)
        if got == 0:
            raise layout.truncated(path)
        done += got
