"""What an HDF5 file that may come from anybody must be, before a value of it is read: plain datasets, all in this file.

HDF5 can lead a reader out of the file that it opened: by external links, by soft links over them, by external storage
and by virtual datasets, whose values are bytes of any file that the reader may open. It can also promise terabytes that
were never stored. A store has none of this; one that has is refused, by name, at opening.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from smoe_hpc.errors import DataError

_MOST = 1000  # variables, or attributes, of a file
_ATTRIBUTE_BYTES = 1 << 20
_DEFLATION = 1032  # what a filter makes of a byte at most (zlib's own bound)
_REMEDY = "a store holds plain values in its own file: write it again from its source"


def require_contained(path: Path, file: h5py.File, chunked_by: str) -> None:
    """Raise unless everything that a file holds is a plain dataset whose values lie in this file, all of them.

    Args:
        path: names the file.
        file: open.
        chunked_by: the variable whose chunks are located one by one elsewhere.

    Raises:
        DataError: an external, soft or user-defined link, a group, external storage, a virtual dataset, values that
            were never stored, or more of them than such a file can hold.
    """
    if len(file.id) > _MOST:
        raise DataError(f"{path} holds {len(file.id)} variables, more than {_MOST}; {_REMEDY}")
    size = path.stat().st_size
    for name in file:
        found = dataset(path, file, name)
        _require_stored(path, found, size, name == chunked_by)


def has(file: h5py.File, name: str) -> bool:
    """Whether a file has a link of that name, wherever it leads: it is not followed."""
    return bool(file.id.links.exists(name.encode()))


def dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset of the file, known to lie in it.

    Raises:
        DataError: a link that may lead elsewhere, no dataset, external storage, a virtual dataset.
        KeyError: nothing of that name.
    """
    if not has(file, name):
        raise KeyError(f"it lacks {name!r}")
    kind = file.id.links.get_info(name.encode()).type
    if kind != h5py.h5l.TYPE_HARD:
        words = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}
        raise DataError(f"{path}: {name!r} is {words.get(kind, 'a link of an unknown kind')}; {_REMEDY}")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: {name!r} is a {type(found).__name__.lower()}, not a dataset; {_REMEDY}")
    if found.is_virtual:
        raise DataError(f"{path}: {name!r} is a virtual dataset, whose values lie in other files; {_REMEDY}")
    if found.external:
        raise DataError(f"{path}: {name!r} has its values in another file ({found.external[0][0]}); {_REMEDY}")
    return found


def numbers(path: Path, file: h5py.File, name: str, dims: int, whole: bool = False) -> np.ndarray:
    """The numbers of a variable with ``dims`` dimensions; ``whole`` ones, of an integer type.

    Raises:
        DataError: another type or another number of dimensions.
        KeyError: no such variable.
    """
    found = dataset(path, file, name)
    if found.dtype.kind not in ("iu" if whole else "iuf") or h5py.check_enum_dtype(found.dtype) is not None:
        due = "whole numbers" if whole else "numbers"
        raise DataError(f"{path}: {name!r} is of type {found.dtype}, but must hold {due}; write the store again")
    if found.ndim != dims:
        raise DataError(f"{path}: {name!r} has shape {found.shape}, but must have {dims} dimensions; write the store again")
    values: np.ndarray = found[...]
    return values


def texts(path: Path, file: h5py.File, name: str) -> list[str]:
    """The texts of a variable with one dimension.

    Raises:
        DataError: another type or shape, or bytes that are no text in UTF-8.
        KeyError: no such variable.
    """
    found = dataset(path, file, name)
    if h5py.check_string_dtype(found.dtype) is None or found.ndim != 1:
        raise DataError(
            f"{path}: {name!r} is of type {found.dtype} and shape {found.shape}, but must be a row of texts; "
            "write the store again"
        )
    try:
        return [str(text) for text in found.asstr()[:]]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {name!r} is not text in UTF-8 ({error.reason}); write the store again") from error


def attribute(path: Path, holder: h5py.HLObject, name: str) -> Any:
    """A text, a number or a row of either; None where there is no such attribute.

    Raises:
        DataError: an attribute of another type, or a larger one.
    """
    if name not in holder.attrs:
        return None
    known = holder.attrs.get_id(name)
    kind = known.dtype
    text = h5py.check_string_dtype(kind) is not None
    plain = text or kind.kind == "b" or (kind.kind in "iuf" and h5py.check_enum_dtype(kind) is None)
    if text and known.shape is None:
        return ""
    if not plain or known.shape is None or len(known.shape) > 1 or math.prod(known.shape) * kind.itemsize > _ATTRIBUTE_BYTES:
        raise DataError(
            f"{path}: attribute {name!r} is of type {kind} and shape {known.shape}, but must be a text, a number or a "
            "row of them; remove it (h5py, or ncatted), or write the store again"
        )
    value = holder.attrs[name]
    try:
        for one in [value] if isinstance(value, str) else value if text and isinstance(value, np.ndarray) else ():
            str(one).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: attribute {name!r} is not text in UTF-8; remove it, or write the store again") from error
    return value


def attributes(path: Path, file: h5py.File, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """All attributes of the file but those named, as :func:`attribute` gives them. DataError as there, or too many."""
    if len(file.attrs) > _MOST:
        raise DataError(f"{path} has {len(file.attrs)} attributes, more than {_MOST}; {_REMEDY}")
    return {name: attribute(path, file, name) for name in file.attrs if name not in leave_out}


def _require_stored(path: Path, found: h5py.Dataset, file_bytes: int, listed: bool) -> None:
    """Raise unless all values of a variable are there, by what HDF5 says without reading them."""
    name = found.name.lstrip("/")
    if found.shape is None:
        raise DataError(f"{path}: {name!r} holds nothing; {_REMEDY}")
    size = found.size * found.dtype.itemsize
    if found.chunks is None:
        missing = found.id.get_storage_size() < size
    elif listed and found.chunks == (1, *found.shape[1:]):
        missing = found.shape[0] * 8 > file_bytes  # each chunk has its place in the file written down
    else:
        chunks = math.prod(-(-total // part) for total, part in zip(found.shape, found.chunks, strict=True))
        most = file_bytes * (_DEFLATION if found.id.get_create_plist().get_nfilters() else 1)
        missing = size > most or found.id.get_num_chunks() != chunks
    if missing:
        raise DataError(
            f"{path}: {name!r} says that it has shape {found.shape}, but its values are not all stored; write the store again"
        )
