"""From data as users have them to a store: one source a file, chosen here by what the file is."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path

from smoe_hpc.errors import DataError
from smoe_hpc.io.access.formats import BY_HAND, DIRECTORY, FIELDS, GRIB, source_format, way_to_a_store
from smoe_hpc.io.convert.grib import convert_grib
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.progress import Progress

Converter = Callable[..., Path]

CONVERTERS: dict[str, Converter] = {GRIB: convert_grib}


def convert(source: str | Path, destination: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Write the store ``destination`` from a file of fields.

    Args:
        source: a file in a format of ``CONVERTERS``, recognised by its first bytes (names lie).
        destination: the store to be written, usually ``<name>.h5``.
        overwrite: replace a store of that name.
        progress: called with (fields done, fields in all).

    Raises:
        DataError: no such file, a format without a converter, or what the converter finds wrong.
    """
    kind = source_format(Path(source))
    if kind not in CONVERTERS:
        converters = f"there are converters for {', '.join(CONVERTERS)}"
        raise DataError(f"{source} is {kind}; {converters}{_instead(Path(source), kind)}")
    return CONVERTERS[kind](source, destination, overwrite=overwrite, progress=progress)


def _instead(source: Path, kind: str) -> str:
    """What can be done with a source that no converter takes, as the end of the error; nothing where nothing can."""
    with contextlib.suppress(DataError):
        open_store(source).close()
        return f". It is a store already: `{shlex.join(['smoe-hpc', 'data', 'inspect', str(source)])}` shows what it holds"
    if kind in FIELDS:
        return f": {BY_HAND}"
    return f"; {way_to_a_store(source)}" if kind == DIRECTORY else ""
