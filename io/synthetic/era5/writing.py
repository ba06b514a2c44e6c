"""A folder of synthetic years: one file a year, shared among the ranks of a communicator, and an index beside them.

A file is written under a name of its own and gets its final name when it is whole, if no other writer was faster; so
several starts into one folder do the same work twice at worst. What is there already and was made in the same way is
kept: a job that was stopped and starts again goes on with the years that are missing.

Dimensions: T times of a file, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.channels import CONSTANTS, Channel, channels_of
from smoe_hpc.io.communicator import SINGLE_PROCESS, Communicator
from smoe_hpc.io.names import known_names
from smoe_hpc.io.store import layout
from smoe_hpc.io.store.chunks import compression_options
from smoe_hpc.io.store.encoding import STORED_TYPES
from smoe_hpc.io.store.index_writing import write_index
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.io.synthetic.era5 import folder as year_files
from smoe_hpc.io.synthetic.era5.fields import SyntheticEarth, global_grid
from smoe_hpc.progress import Progress

VERSION = 1
NOTICE = "SYNTHETIC: random waves on a made-up Earth. Neither observed nor forecast weather, and not ERA5"
_SLAB_BYTES = 16 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """What :func:`synthesize` did.

    Args:
        paths: all files that were asked for, by year.
        written: those that were not there before.
        samples: times in all files.
    """

    paths: tuple[Path, ...]
    written: tuple[Path, ...]
    samples: int


def synthesize(
    folder: str | Path,
    grid: tuple[int, int] = (128, 256),
    years: float = 2.0,
    step: int = 6,
    *,
    channels: str = "rt38",
    start: int = 2015,
    days: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    compression: str | None = None,
    overwrite: bool = False,
    communicator: Communicator = SINGLE_PROCESS,
    progress: Progress | None = None,
) -> Written:
    """Write ``synthetic_<year>.h5`` for each year, and ``index.json``; collective over the communicator.

    The fields of a time depend on (seed, grid, time) alone: not on the years asked for, the step, or the ranks. Units
    are those of :mod:`smoe_hpc.io.channels`; tisr is of the hour before a time, tp of the six hours before it.

    Args:
        folder: made when missing; all its stores must be of this kind.
        grid: (H, W), spread evenly over the Earth.
        years: how many from the first of January of ``start``; a part of a year is its first days.
        step: hours between times, a divisor of 24.
        channels: name of the set.
        start: first year.
        days: how many days instead of years.
        seed: of weather and continents.
        dtype: ``"float32"``, ``"float16"`` or ``"int16"``.
        compression: as in :class:`~smoe_hpc.io.store.writer.StoreWriter`.
        overwrite: replace files of these years that were made in another way.
        communicator: ranks that share the years.
        progress: called with (times done, times in all) of this rank.

    Raises:
        DataError: impossible arguments, other data in the folder, too little space; on every rank the same one.
    """
    folder = Path(folder)
    chosen = channels_of(channels)
    points = global_grid(*grid)
    if dtype not in STORED_TYPES:
        raise DataError(f"dtype {dtype!r} is unknown; {known_names(dtype, STORED_TYPES)}")
    compression_options(compression)
    made_by: dict[str, object] = {
        "synthetic_earth": VERSION,
        "grid": list(grid),
        "step": step,
        "channels": channels,
        "seed": seed,
        "dtype": dtype,
        "compression": compression,
    }
    files = year_files.plan_files(folder, years, days, start, step, made_by)
    earth = SyntheticEarth(points, seed)
    sample_bytes = len(chosen) * grid[0] * grid[1] * STORED_TYPES[dtype].itemsize
    smallest = 0 if compression else sample_bytes  # how far a compressor gets is not known before

    def look() -> list[year_files.YearFile] | None:
        if communicator.rank != 0:  # one rank decides: others may see a shared folder a moment later
            return None
        year_files.remove_abandoned(folder)
        missing = [file for file in files if not year_files.is_there(file, overwrite)]
        year_files.require_same_kind(folder, files, made_by)
        year_files.require_space(folder, missing, smallest)
        return missing

    missing = _together(communicator, look)[0] or []
    mine = missing[communicator.rank :: communicator.world]
    total, done = sum(len(file.times) for file in mine), 0

    def tell(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total)

    def write() -> None:
        for file in mine:
            with year_files.publish(file, overwrite) as partial:
                _write_year(partial, file, earth, chosen, dtype, compression, tell)

    _together(communicator, write)
    if _together(communicator, lambda: communicator.rank == 0 and (bool(missing) or not year_files.is_indexed(folder)))[0]:
        write_index(folder, communicator)
    paths = tuple(file.path for file in files)
    return Written(paths, tuple(file.path for file in missing), sum(len(file.times) for file in files))


def _write_year(
    path: Path,
    file: year_files.YearFile,
    earth: SyntheticEarth,
    channels: Sequence[Channel],
    dtype: str,
    compression: str | None,
    tell: Callable[[int], None],
) -> None:
    """Write one file under a name of the moment; ``tell`` hears how many more samples are there."""
    sample = (len(channels), *earth.grid.shape)
    slab = np.empty((max(1, _SLAB_BYTES // (4 * math.prod(sample))), *sample), dtype=np.float32)
    with StoreWriter(
        path,
        earth.grid,
        [channel.name for channel in channels],
        [channel.units for channel in channels],
        coords={"time": file.times},
        constants={name: earth.constants[name] for name in CONSTANTS},
        attributes={
            layout.SYNTHETIC: NOTICE,
            "sources": f"synthetic: smoe-hpc data synthesize, version {VERSION}",
            "regridding": "none",
            "recipe": file.recipe,
        },
        dtype=dtype,
        transforms=[channel.transform for channel in channels],
        compression=compression,
    ) as writer:
        for first in range(0, len(file.times), len(slab)):
            some = file.times[first : first + len(slab)]
            for row, when in enumerate(some):
                earth.fill(when, slab[row])
            writer.write(first, slab[: len(some)])
            tell(len(some))


def _together(communicator: Communicator, action: Callable[[], T]) -> list[T]:
    """Do something on every rank; what all got, or the first rank's error on all of them (none waits for ever)."""
    try:
        outcome: tuple[T | None, str | None] = action(), None
    except DataError as error:
        outcome = None, str(error)
    outcomes = communicator.gather(outcome)
    for _, refusal in outcomes:
        if refusal is not None:
            raise DataError(refusal)
    return [value for value, _ in outcomes]
