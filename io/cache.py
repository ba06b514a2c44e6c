"""Where results that are slow to compute from a store are kept: beside it, or with the user where that is read-only.

A cached file is named by everything that it depends on, the store's digest among it, so an old one is never taken for a
new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.io.fields import FieldReader
from smoe_hpc.io.samples import Split

SMALL_BYTES = 4 << 30  # more than this is not gone over in passing, by every process of a training for itself
_VARIABLE = "SMOE_CACHE"


def cache_file(store: FieldReader, kind: str, key_parts: Sequence[object], suffix: str) -> Path:
    """The file for one result: where it is, or where it is to be written.

    ``<folder of the data>/<kind>/<first part>-<hash><suffix>``; where that folder cannot be written, the same below
    ``$SMOE_CACHE``, or ``~/.cache/smoe-hpc``. A file that is already there is found in either place.

    Args:
        store: the data; its digest belongs to the key.
        kind: what it is, e.g. ``"statistics"``.
        key_parts: what else it depends on, anything whose ``repr`` says all of it; the first names the file for people.
        suffix: e.g. ``".json"``.
    """
    key = hashlib.sha256(repr([kind, store.digest(), *key_parts]).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", str(key_parts[0]))[:40] if key_parts else kind
    name = f"{readable}-{key}{suffix}"
    beside, with_user = store.folder / kind / name, _users_folder() / kind / name
    if beside.exists() or (not with_user.exists() and _can_write(store.folder / kind)):
        return beside
    return with_user


def refuse_large(store: FieldReader, split: Split, num_channels: int, what: str) -> None:
    """Raise where a result that is not cached would take going over much data.

    Args:
        store: the data.
        split: the fields to go over.
        num_channels: how many channels of them.
        what: the result, as in "statistics".

    Raises:
        DataError: more than ``SMALL_BYTES``; it names the command that prepares the data.
    """
    height, width = store.grid.shape
    fields = int(split.mask(store.coords).sum())
    size = fields * num_channels * height * width * store.encoding.stored_type.itemsize
    if size > SMALL_BYTES:
        raise DataError(
            f"{what} of {size / 2**30:,.1f} GiB of {store.path} (split {split.text!r}) are not computed yet; "
            f"run `smoe-hpc data statistics RECIPE data.store={store.path}` first (srun or mpirun share the work; "
            "the Slurm scripts do it)"
        )


def _users_folder() -> Path:
    return Path(os.environ.get(_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoe-hpc")


def _can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, or it itself; asked by trying, since permissions do not tell all."""
    there = folder if folder.exists() else folder.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False
