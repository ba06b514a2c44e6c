"""Where results that are slow to compute from a store are kept: beside it, or with the user where that is read-only.

A cached file is named by everything that it depends on, the store's digest among it, so an old one is never taken for a
new one. One that another user may have put there is not read: beside the data, a user who could not change the data as
well; with the user, anybody else but root.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.files.beside import make_folder, open_up
from smoe_hpc.files.caches import place_for
from smoe_hpc.files.trust import added
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.store.interface import FieldReader

SMALL_BYTES = 4 << 30  # more than this is not gone over in passing, by every process of a training for itself


def cache_file(store: FieldReader, kind: str, key_parts: Sequence[object], suffix: str) -> Path:
    """The file for one result: where it is, or where it is to be written.

    ``<folder of the data>/<kind>/<first part>-<hash><suffix>``; where that folder cannot be written, the same below
    ``$SMOE_CACHE``, or ``~/.cache/smoe-hpc``. A file that is already there is found in either place; one beside the data
    that another user keeps to himself is as good as none.

    Args:
        store: the data; its digest belongs to the key.
        kind: what it is, e.g. ``"statistics"``.
        key_parts: what else it depends on, anything whose ``repr`` says all of it; the first names the file for people.
        suffix: e.g. ``".json"``.
    """
    key = hashlib.sha256(repr([kind, store.digest(), *key_parts]).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", str(key_parts[0]))[:40] if key_parts else kind
    name = f"{readable}-{key}{suffix}"
    beside = store.folder / kind / name
    reason = added(beside, store.path, store.folder)
    if reason is None and os.access(beside, os.R_OK):
        return beside
    place = place_for(kind, name)
    with_user = place.folder / name
    if reason is not None:
        warnings.warn(f"{reason}: {beside} is not used, {with_user} serves instead", stacklevel=3)
    elif not with_user.exists() and not os.path.lexists(beside) and _can_write(store.folder / kind):
        return beside
    place.warn()
    with contextlib.suppress(OSError):  # writing the file will report it
        place.make()
    return with_user


def keep(path: Path, save: Callable[[Path], None], folder: Path) -> None:
    """Save a result as the file that `cache_file` names; beside the data it is as open as their folder, and no more.

    Args:
        path: the file.
        save: writes it.
        folder: of the data.

    Raises:
        DataError: it cannot be written.
    """
    is_beside = path.parent.parent == folder
    if is_beside:
        with contextlib.suppress(OSError):  # saving says so
            make_folder(path.parent)
    save(path)
    if is_beside:
        open_up(path)


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


def _can_write(folder: Path) -> bool:
    """Whether files, or the folder itself, can be made; found by trying, since permissions do not tell all."""
    there = folder if folder.exists() else folder.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False
