"""From data as users have them to a store: one source a file, chosen here by what the file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.io.convert.grib import convert_grib

Progress = Callable[[int, int], None]
Converter = Callable[..., Path]

CONVERTERS: dict[str, Converter] = {"GRIB": convert_grib}
_SIGNATURES = {b"GRIB": "GRIB", b"CDF": "netCDF", b"\x89HDF": "netCDF-4 or HDF5", b"BUFR": "BUFR"}
_HEADER_BYTES = 64  # a GRIB message may stand behind a short bulletin heading


def convert(
    source: str | Path, destination: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Write the store ``destination`` from a file of fields.

    Args:
        source: a file in a format of ``CONVERTERS``, told by its first bytes (names lie).
        destination: the store to be written, usually ``<name>.h5``.
        overwrite: replace a store of that name.
        progress: called with (fields done, fields in all).

    Raises:
        DataError: no such file, a format without a converter, or what the converter finds wrong.
    """
    kind = source_format(Path(source))
    if kind not in CONVERTERS:
        raise DataError(f"{source} is {kind}; there are converters for {', '.join(CONVERTERS)}")
    return CONVERTERS[kind](source, destination, overwrite=overwrite, progress=progress)


def source_format(path: Path) -> str:
    """What a file is, by its first bytes; for anything unknown a description that fits an error.

    Raises:
        DataError: no such file.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give the file to convert")
    if path.is_dir():
        return "a directory"
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature) or (kind == "GRIB" and signature in head):
            return kind
    return "of an unknown format" if head else "empty"
