"""One short text that changes with anything that a store holds.

It goes over names, coordinates, constants and attributes, and over the checksum that ends each chunk: 4 bytes a sample
instead of megabytes, so that it is cheap and still sees every field.

Dimensions: T samples of the store.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from smoe_hpc.io.store.chunks import Chunks
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.io.store.layout import CHECKSUM_BYTES

_PIECE_BYTES = 4 << 20


def digest_store(store: FieldReader, chunks: Chunks | None, descriptor: int) -> str:
    """sha256 of a store, in hexadecimal.

    Args:
        store: what it says of itself.
        chunks: where its samples lie; None where they are laid out otherwise, and the whole file counts.
        descriptor: the open file.
    """
    found = hashlib.sha256()
    encoding = store.encoding
    about = [sorted((name, str(value)) for name, value in store.attributes.items()), store.num_samples]
    about += [store.channels, store.units, store.transforms, store.grid.kind, encoding.dtype]
    found.update(repr(about).encode())
    arrays: dict[str, np.ndarray] = {"scale": encoding.scale, "offset": encoding.offset}
    arrays |= {"lat": store.grid.lat, "lon": store.grid.lon}
    for kind, group in (("", arrays), ("coords", store.coords), ("constants", store.constants)):
        for name, values in sorted(group.items()):
            found.update(repr((kind, name, str(values.dtype), values.shape)).encode())
            found.update(np.ascontiguousarray(values).tobytes())
    if chunks is None:
        _add_bytes(found, descriptor, 0, os.fstat(descriptor).st_size)
        return found.hexdigest()
    for offset, size in zip(chunks.offsets.tolist(), chunks.sizes.tolist(), strict=True):
        used = min(CHECKSUM_BYTES, size) if chunks.checksums else size
        _add_bytes(found, descriptor, offset + size - used, used)
    return found.hexdigest()


def combine_digests(digests: Iterable[str]) -> str:
    """sha256 of several files one after the other."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _add_bytes(found: Any, descriptor: int, offset: int, size: int) -> None:
    end = offset + size
    while offset < end and (piece := os.pread(descriptor, min(_PIECE_BYTES, end - offset), offset)):
        found.update(piece)
        offset += len(piece)
