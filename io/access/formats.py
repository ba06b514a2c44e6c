"""What a file is, by its first bytes (names lie), and what can be made of one that is no store."""

from __future__ import annotations

import shlex
from itertools import islice
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import require_regular

GRIB, HDF5, ZARR, DIRECTORY = "GRIB", "netCDF-4 or HDF5", "Zarr", "a directory"
_SIGNATURES = {b"GRIB": GRIB, b"CDF": "netCDF", b"\x89HDF": HDF5, b"BUFR": "BUFR"}
_HEADER_BYTES = 64  # a GRIB message may stand behind a short bulletin heading
_ZARR_NAMES = (".zgroup", ".zarray", ".zmetadata", "zarr.json")
_LOOKED_AT = 100  # files of a folder
FIELDS = ("netCDF", HDF5, ZARR)
BY_HAND = "write a store from it in Python, with xarray and smoe_hpc.io.StoreWriter (docs/weather.md)"


def source_format(path: Path) -> str:
    """What a file is; for anything unknown a description that fits an error.

    Raises:
        DataError: no such file, no regular one, or one that cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give the file to convert")
    if path.is_dir():
        return ZARR if any((path / name).exists() for name in _ZARR_NAMES) else DIRECTORY
    require_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); ask for the right to, or copy it") from None
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature) or (kind == GRIB and signature in head):
            return kind
    return "of an unknown format" if head else "empty"


def way_to_a_store(path: Path) -> str:
    """What can be done with a file, or a folder, that is no store, as the end of an error; nothing that would be refused."""
    try:
        kind = source_format(path)
    except DataError:
        return "give a store"
    if kind == GRIB:
        store = f"{path.stem}.h5" if path.suffix != ".h5" else f"{path.stem}_store.h5"
        words = shlex.join(["smoe-hpc", "data", "convert", str(path), store])
        return f"`{words}` makes one of GRIB with surface fields on a regular latitude-longitude grid"
    if kind in FIELDS:
        return f"no converter reads {kind}: {BY_HAND}"
    if kind == DIRECTORY:
        return _way_within(path)
    return f"it is {kind}; give a store"


def _way_within(folder: Path) -> str:
    """What can be done with the first file in a folder that could become a store."""
    try:
        inside = sorted(islice(folder.iterdir(), _LOOKED_AT))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    for one in inside:
        try:
            kind = source_format(one)
        except DataError:
            continue
        if kind in (GRIB, *FIELDS):
            return f"{one.name} is in it: {way_to_a_store(one)}"
    return "give a folder that has some, or a store file"
