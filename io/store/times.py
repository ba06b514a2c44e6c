"""The names of a new store's samples as their writer gives them: times that say what they are, and whole numbers.

A number is not a time: 876576 may be hours since 1900, days since 2000 or nanoseconds since 1970, and a store that took
it for one of them would be wrong by decades without a word. So only types that carry their unit are taken.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np

from smoe_hpc.errors import DataError

_FIRST_YEAR, _LAST_YEAR = 1, 9999
_NUMBERS = (
    "numbers do not say what they count; give datetime64, e.g. "
    "np.datetime64('1900-01-01') + hours.astype(int) * np.timedelta64(1, 'h')"
)


def written_coords(coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Coordinates as a writer takes them: ``time`` as datetime64[s], the others as int64.

    Raises:
        DataError: what :func:`as_times` refuses; numbers of runs, steps or members that are not whole.
    """
    return {name: as_times(values) if name == "time" else _as_whole(name, values) for name, values in coords.items()}


def as_times(values: Any) -> np.ndarray:
    """Times as datetime64[s], from datetime64 of any unit or from datetime objects (those with a time zone to UTC).

    Raises:
        DataError: numbers, texts, times of another calendar (cftime), missing ones (NaT), fractions of a second, years
            outside 1 to 9999.

    >>> as_times(np.array(["2019-03-01T06"], dtype="datetime64[h]"))
    array(['2019-03-01T06:00:00'], dtype='datetime64[s]')
    """
    given = np.asarray(values)
    if given.dtype.kind == "O":
        given = np.array([_from_object(value) for value in given.reshape(-1)], "datetime64[us]").reshape(given.shape)
    if given.dtype.kind != "M":
        raise DataError(f"times are of type {given.dtype}: {_NUMBERS}")
    _require_each(~np.isnat(given), given, "is missing (NaT)", "leave that sample out")
    with np.errstate(over="ignore"):
        years = given.astype("datetime64[Y]").astype(np.int64) + 1970
    known = (years >= _FIRST_YEAR) & (years <= _LAST_YEAR)
    _require_each(known, years, f"is a year outside {_FIRST_YEAR} to {_LAST_YEAR}", "check the unit of the times")
    seconds = given.astype("datetime64[s]")
    _require_each(seconds == given, given, "has a fraction of a second, which a store does not keep", "round the times first")
    return seconds


def _from_object(value: Any) -> np.datetime64:
    if isinstance(value, np.datetime64):
        return value
    if isinstance(value, datetime.datetime) and value == value:  # pandas' NaT is a datetime that is not itself
        naive = value if value.tzinfo is None else value.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        return np.datetime64(naive, "us")
    calendar = getattr(value, "calendar", None)
    if calendar is not None:
        raise DataError(
            f"time {value} is of the calendar {calendar!r}; a store's days are those of the standard calendar: convert the "
            "times (xarray: convert_calendar), and leave out what has no such day"
        )
    if value is None or value != value:
        raise DataError("a time is missing (NaT); leave that sample out")
    raise DataError(f"time {value!r:.60} is of type {type(value).__name__}: {_NUMBERS}")


def _require_each(good: np.ndarray, values: np.ndarray, what: str, remedy: str) -> None:
    if not good.all():
        row = int(np.argmin(good.reshape(-1)))
        raise DataError(f"time {values.reshape(-1)[row]} (row {row}) {what}; {remedy}")


def _as_whole(name: str, values: Any) -> np.ndarray:
    given = np.asarray(values)
    if given.dtype.kind not in "iu" or (given.dtype.kind == "u" and given.size and int(given.max()) > np.iinfo(np.int64).max):
        raise DataError(f"coordinate {name!r} is of type {given.dtype}, but must hold whole numbers; cast it to int64")
    return given.astype(np.int64)
