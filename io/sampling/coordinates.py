"""Where stored fields lie: on one axis of seconds, or of steps of runs that lie far apart.

Dimensions: T stored fields, n starts asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smoe_hpc.errors import DataError

SECONDS_PER_HOUR = 3600


def axis_of(coords: Mapping[str, np.ndarray], reach: int) -> tuple[np.ndarray, int]:
    """Each field on one axis, and the unit of windows on it.

    Args:
        coords: ``time`` [T] datetime64, or ``run`` and ``step`` [T] integers.
        reach: of a window, in steps; runs are too far apart on the axis for it to join them.

    Returns:
        [T] int64, and what one hour or one step is on the axis.

    Raises:
        DataError: other coordinates.
    """
    if "time" in coords:
        return coords["time"].astype("datetime64[s]").astype(np.int64), SECONDS_PER_HOUR
    run, step = _runs_and_steps(coords)
    return run * _apart(step, reach) + step, 1


def starts_on_axis(coords: Mapping[str, np.ndarray], starts: np.ndarray, reach: int) -> np.ndarray:
    """Starts on the axis of `axis_of`, stored or not.

    Args:
        coords: of the store.
        starts: [n] datetime64; where samples are runs and steps, [n, 2] integers of both.
        reach: as there.

    Raises:
        DataError: starts of the other kind, or times that are not whole seconds.
    """
    starts = np.asarray(starts)
    if "time" in coords:
        seconds = starts.astype("datetime64[s]") if starts.dtype.kind == "M" and starts.ndim == 1 else None
        if seconds is None or (seconds != starts).any():  # as it is of NaT, too
            what = f"starts are {starts.dtype} {starts.shape}"
            raise DataError(f"{what}; give a datetime64 of whole seconds for each, e.g. np.datetime64('2017-01-01T00')")
        return seconds.astype(np.int64)
    step = _runs_and_steps(coords)[1]
    if starts.dtype.kind not in "iu" or starts.ndim != 2 or starts.shape[1] != 2:
        raise DataError(f"starts are {starts.dtype} {starts.shape}; samples are runs and steps: give [run, step] of each start")
    # Beyond the stored steps by more than a window's reach nothing can be stored, and another run would be met.
    low, high = (int(step.min()), int(step.max())) if len(step) else (0, 0)
    bounded = np.clip(starts[:, 1].astype(np.int64), low - reach - 1, high + reach + 1)
    return starts[:, 0].astype(np.int64) * _apart(step, reach) + bounded


def extent(coords: Mapping[str, np.ndarray]) -> str:
    """How many fields there are, from which to which, in words.

    >>> extent({"run": np.array([0, 0, 1]), "step": np.array([0, 1, 0])})
    '3 fields (run 0 to 1)'
    """
    name = "time" if "time" in coords else "run"
    values = coords[name]
    return f"{len(values)} fields" + (f" ({name} {values[0]} to {values[-1]})" if len(values) else "")


def _runs_and_steps(coords: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if "run" not in coords or "step" not in coords:
        raise DataError(f"samples are named by {', '.join(coords)}; windows need time, or run and step")
    return np.asarray(coords["run"], dtype=np.int64), np.asarray(coords["step"], dtype=np.int64)


def _apart(step: np.ndarray, reach: int) -> int:
    """From one run to the next on the axis."""
    return 2 * (int(np.ptp(step)) + reach + 1) if len(step) else 1
