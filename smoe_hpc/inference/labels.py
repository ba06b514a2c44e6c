"""Forecasts as an xarray Dataset that scorers read: names, levels, units and coordinates.

Channels such as ``z500`` become a variable of a known name (``geopotential``) with a ``level`` in hPa; one whose name is not
known keeps it. Names are those that ERA5 and WeatherBench 2 use.

Dimensions: n starts, L leads, Ct targets, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.runs.description import ChannelScaling, Description

if TYPE_CHECKING:
    import xarray

LEVEL_VARIABLES = {
    "z": "geopotential",
    "t": "temperature",
    "u": "u_component_of_wind",
    "v": "v_component_of_wind",
    "q": "specific_humidity",
    "r": "relative_humidity",
    "w": "vertical_velocity",
}
SURFACE_VARIABLES = {
    "t2m": "2m_temperature",
    "d2m": "2m_dewpoint_temperature",
    "u10": "10m_u_component_of_wind",
    "v10": "10m_v_component_of_wind",
    "msl": "mean_sea_level_pressure",
    "sp": "surface_pressure",
    "tp": "total_precipitation_6hr",
    "tisr": "toa_incident_solar_radiation",
}
_LEVEL = re.compile(r"([a-z]+)(\d{1,4})")


def variable_of(channel: str) -> tuple[str, int | None]:
    """Name of a channel's variable, and its pressure level in hPa where it has one.

    >>> variable_of("z500"), variable_of("t2m"), variable_of("heat")
    (('geopotential', 500), ('2m_temperature', None), ('heat', None))
    """
    if channel in SURFACE_VARIABLES:
        return SURFACE_VARIABLES[channel], None
    match = _LEVEL.fullmatch(channel)
    if match and match.group(1) in LEVEL_VARIABLES:
        return LEVEL_VARIABLES[match.group(1)], int(match.group(2))
    return channel, None


def import_xarray() -> Any:
    """xarray; DataError where it is not installed."""
    try:
        import xarray
    except ImportError as error:
        raise DataError("forecasts are xarray Datasets; pip install 'smoe-hpc[convert]'") from error
    return xarray


def as_starts(starts: Any, about: Description) -> list[Any]:
    """Starts as a list of datetime64[s], or of (run, step).

    Raises:
        DataError: a start that is none, or none at all.
    """
    several = starts
    if about.axis == "time":
        if isinstance(starts, (str, np.datetime64, datetime)) or np.ndim(starts) == 0:
            several = [starts]
        try:
            found: list[Any] = [_second(start) for start in several]
        except (ValueError, TypeError) as error:
            raise DataError(f"starts={starts!r}: {error}; give times such as 2017-01-01T00") from None
        if any(np.isnat(start) for start in found):
            raise DataError(f"starts={starts!r}: a start is not a time; give times such as 2017-01-01T00")
    else:
        if isinstance(starts, tuple) and np.ndim(starts) == 1:
            several = [starts]
        try:
            found = [(int(run), int(step)) for run, step in several]
        except (ValueError, TypeError):
            raise DataError(f"starts={starts!r}: this model forecasts steps of runs; give (run, step) pairs") from None
    if not found:
        raise DataError("no start is given; give one, or leave starts out for all")
    return found


def _second(start: Any) -> np.datetime64:
    """A start as datetime64[s]; ValueError or TypeError where it is no time of whole seconds."""
    if isinstance(start, (int, float, np.number)):
        raise TypeError(f"{start!r} is a number")
    second = np.datetime64(start, "s")
    if isinstance(start, np.datetime64) and start != second and not np.isnat(start):
        raise ValueError(f"{start} is no whole second")
    return second


def as_dataset(
    values: np.ndarray, starts: Sequence[Any], leads: Sequence[int], about: Description, recipe: str
) -> xarray.Dataset:
    """A Dataset of forecasts.

    Args:
        values: [n, L, Ct, H, W] float32.
        starts: n, as `as_starts` gives them.
        leads: L.
        about: of the network.
        recipe: its name.
    """
    xarray = import_xarray()
    dims, coords = _axes(starts, leads, about)
    variables: dict[str, Any] = {}
    groups: dict[str, list[tuple[int | None, int]]] = {}
    for place, target in enumerate(about.targets):
        name, level = variable_of(target.name)
        groups.setdefault(name, []).append((level, place))
    levels = sorted({level for group in groups.values() for level, _ in group if level is not None})
    if levels:
        coords["level"] = ("level", np.array(levels, dtype=np.int32), {"units": "hPa", "long_name": "pressure level"})
    for name, group in groups.items():
        attributes = _attributes(name, about.targets[group[0][1]])
        if group[0][0] is None:
            variables[name] = (dims, values[:, :, group[0][1]], attributes)
            continue
        stacked = np.full((*values.shape[:2], len(levels), *values.shape[3:]), np.nan, dtype=np.float32)
        for level, place in group:
            stacked[:, :, levels.index(level)] = values[:, :, place]  # type: ignore[arg-type]
        variables[name] = ((*dims[:2], "level", *dims[2:]), stacked, attributes)
    about_all = {
        "Conventions": "CF-1.8",
        "title": f"forecasts of {recipe}",
        "source": f"smoe-hpc {about.version}, recipe {recipe}, step {about.step}",
    }
    if about.synthetic:
        about_all["comment"] = "The network was trained on synthetic data."
    return xarray.Dataset(variables, coords, about_all)


def _axes(starts: Sequence[Any], leads: Sequence[int], about: Description) -> tuple[tuple[str, ...], dict[str, Any]]:
    if about.axis == "run":
        runs, steps = np.array(starts, dtype=np.int64).reshape(-1, 2).T
        return ("start", "lead", "row", "column"), {
            "run": ("start", runs),
            "step": ("start", steps),
            "lead": ("lead", np.array(leads, dtype=np.int64), {"long_name": "steps ahead"}),
        }
    degrees = {
        "latitude": ("latitude", about.grid.lat, {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": ("longitude", about.grid.lon, {"units": "degrees_east", "standard_name": "longitude"}),
    }
    return ("time", "prediction_timedelta", "latitude", "longitude"), {
        "time": ("time", np.array(starts, dtype="datetime64[ns]"), {"long_name": "start of the forecast"}),
        "prediction_timedelta": (
            "prediction_timedelta",
            np.array(leads, dtype="timedelta64[h]").astype("timedelta64[ns]"),
            {"long_name": "time from the start"},
        ),
        **degrees,
    }


def _attributes(name: str, target: ChannelScaling) -> dict[str, str]:
    units = "m**2 s**-2" if target.units == "m2 s-2" else target.units
    return {"units": units, "long_name": name.replace("_", " ")}
