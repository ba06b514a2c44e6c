"""What lies in a folder of synthetic years: which files there are to be, which are there, and how one gets there.

Dimensions: T times of a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import NotPlainError, parse_json
from smoe_hpc.io.access.contained import attribute
from smoe_hpc.io.store.index import read_index
from smoe_hpc.io.store.layout import SUFFIX, open_hdf5

NAME = "synthetic"
_ABANDONED = 15 * 60.0  # seconds without a write after which an unfinished file counts as abandoned
_OVERHEAD = 8 << 20  # bytes of a file beside its fields


@dataclass(frozen=True)
class YearFile:
    """What one file is to hold.

    Args:
        path: its final name.
        times: [T] datetime64[s].
        recipe: JSON of everything that its fields follow from, times included.
    """

    path: Path
    times: np.ndarray
    recipe: str


def plan_files(
    folder: Path, years: float, days: int | None, start: int, step: int, made_by: Mapping[str, object]
) -> list[YearFile]:
    """The files and their times; pure.

    Raises:
        DataError: a step that does not divide the day, no time, years outside 1..9999.

    >>> files = plan_files(Path("out"), 1.5, None, 2015, 6, {})
    >>> [(file.path.name, len(file.times), str(file.times[-1])) for file in files]
    [('synthetic_2015.h5', 1460, '2015-12-31T18:00:00'), ('synthetic_2016.h5', 732, '2016-07-01T18:00:00')]
    """
    if step < 1 or 24 % step:
        raise DataError(f"a step of {step} hours does not divide the day; give 1, 2, 3, 4, 6, 8, 12 or 24")
    if not (days > 0 if days is not None else 0 < years < 10000):
        raise DataError(f"{f'{days} days' if days is not None else f'{years} years'} hold no time; give more than 0")
    whole = int(years)
    first = np.datetime64(f"{start:04d}-01-01", "D") if 1 <= start <= 9999 else None
    if first is None or start + years > 10000 or (days or 0) > 3_000_000:
        raise DataError(f"the years from {start} on do not lie within 1..9999; give another start or fewer years")
    if days is not None:
        end = first + days
    else:
        turn = (first.astype("datetime64[Y]") + whole).astype("datetime64[D]")
        length = int(((turn.astype("datetime64[Y]") + 1).astype("datetime64[D]") - turn).astype(int))
        end = turn + round((years - whole) * length)
    if end <= first:
        raise DataError(f"{years} years are less than a day; give more, or --days")
    times = np.arange(first.astype("datetime64[s]"), end.astype("datetime64[s]"), np.timedelta64(step, "h"))
    calendar = times.astype("datetime64[Y]").astype(int) + 1970
    files = []
    for year in np.unique(calendar):
        some = times[calendar == year]
        recipe = {**made_by, "times": [str(some[0]), str(some[-1])]}
        files.append(YearFile(folder / f"{NAME}_{year:04d}.h5", some, json.dumps(recipe, sort_keys=True)))
    return files


def is_there(file: YearFile, overwrite: bool) -> bool:
    """Whether a file is there already, made as it is to be; False too where another may be replaced.

    Raises:
        DataError: another is there and may not be replaced.
    """
    if not file.path.exists():
        return False
    found = _recipe_of(file.path)
    if found == file.recipe:
        return True
    if overwrite:
        return False
    raise DataError(
        f"{file.path} holds other data ({found or 'not synthetic, or damaged'}) than asked for ({file.recipe}); "
        "name another folder, ask for the same, or replace it with --overwrite"
    )


def require_same_kind(folder: Path, files: list[YearFile], made_by: Mapping[str, object]) -> None:
    """Raise unless other years in the folder were made in the same way, because a folder is one store.

    Raises:
        DataError: names the first file of another kind.
    """
    for path in sorted(set(folder.glob("*" + SUFFIX)) - {file.path for file in files}):
        found = _recipe_of(path)
        try:
            recipe = parse_json(found)
        except NotPlainError:
            recipe = {}
        recipe.pop("times", None)
        if recipe != made_by:
            raise DataError(
                f"{path} lies in the same folder and is of another kind ({found or 'not synthetic, or damaged'}); "
                "name another folder or move that file away"
            )


def require_space(folder: Path, missing: list[YearFile], sample_bytes: int) -> None:
    """Make the folder, and raise unless there is space for the missing files.

    Raises:
        DataError: too little, or a folder that cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}; name another folder") from error
    needed = sum(len(file.times) * sample_bytes + _OVERHEAD for file in missing)
    if needed > free:
        raise DataError(
            f"no space in {folder}: {len(missing)} files need {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "free some, choose another folder, or ask for fewer years or --dtype int16. Nothing was written"
        )


def remove_abandoned(folder: Path) -> None:
    """Remove what writers left that were killed; a living one writes every few seconds."""
    for path in folder.glob(f"{NAME}_*{SUFFIX}.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


@contextlib.contextmanager
def publish(file: YearFile, overwrite: bool) -> Iterator[Path]:
    """A name to write to that no other writer has; the file gets its final name at the end, if that is still free.

    A file that another start finished meanwhile is kept, because it may be in use already.
    """
    own = file.path.with_name(f"{file.path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield own
        _name(own, file, overwrite)
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


def _name(own: Path, file: YearFile, overwrite: bool) -> None:
    try:
        try:
            os.link(own, file.path)
        except FileExistsError:
            if not is_there(file, overwrite):
                os.replace(own, file.path)
        except OSError:  # a file system without hard links
            os.replace(own, file.path)
    except OSError as error:
        raise DataError(f"cannot write {file.path}: {error.strerror or error}; choose another folder") from error


def is_indexed(folder: Path) -> bool:
    """Whether the index lists just the files that are there, as large as they are."""
    try:
        index = read_index(folder)
    except DataError:
        return False
    there = {path.name: path.stat().st_size for path in folder.glob("*" + SUFFIX)}
    return index is not None and {entry.name: entry.bytes for entry in index.files} == there


def _recipe_of(path: Path) -> str:
    """What a file says it was made with; empty for anything else that lies there, damaged files included."""
    try:
        with open_hdf5(path) as file:
            return str(attribute(path, file, "recipe") or "")
    except DataError:
        return ""
