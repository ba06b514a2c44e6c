"""The channels of the weather experiments: their names, units and the bounds that packed encodings rest on.

Rasp and Thuerey (2021) take five variables on seven pressure levels (35 channels), the solar radiation at the top of
the atmosphere, the temperature 2 m above ground and the precipitation of six hours: 38 in all, in this order.

The bounds are wide on purpose. An encoding of 16 bits spreads its steps between them and refuses what lies outside, so
they hold the extremes of a reanalysis (the polar vortex in sudden warmings, tropical cyclones, temperatures continued
below high ground, slightly negative humidity from interpolation, radiation accumulated over one to six hours) and not
just usual weather; what a step then costs is a small share of a channel's standard deviation, which
``smoe-hpc data verify`` reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from smoe_hpc.errors import DataError
from smoe_hpc.io.names import known_names

LEVELS = (50, 250, 500, 600, 700, 850, 925)  # hPa
CONSTANTS = ("land_sea_mask", "orography", "latitude")  # 1 (share of land), m, degrees north
CONSTANT_UNITS = {"land_sea_mask": "1", "orography": "m", "latitude": "degrees_north"}
PRECIPITATION_TRANSFORM = "log:0.001"


@dataclass(frozen=True)
class Channel:
    """One channel of a store.

    Args:
        name: e.g. ``z500``: the variable, then its pressure level in hPa where it has one.
        units: of the physical values.
        low: smallest value that can be stored, after the transform.
        high: largest value that can be stored, after the transform.
        transform: ``"none"``, or ``"log:0.001"``: log(1 + x / 0.001) of a value x in metres of six hours.

    Raises:
        DataError: bounds that hold nothing.
    """

    name: str
    units: str
    low: float
    high: float
    transform: str = "none"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise DataError(f"channel {self.name!r} has bounds {self.low:g}..{self.high:g}; low must be below high")


# Bounds by level (LEVELS, in order): geopotential m2 s-2, temperature K, wind m s-1 (both signs), humidity kg kg-1.
_GEOPOTENTIAL = (
    (165e3, 215e3),
    (80e3, 115e3),
    (40e3, 63e3),
    (27e3, 48e3),
    (16e3, 37e3),
    (0.0, 20e3),
    (-7e3, 14e3),
)
_TEMPERATURE = ((160, 290), (175, 275), (195, 300), (195, 310), (190, 320), (185, 335), (185, 345))
_WIND = (170, 170, 140, 130, 130, 130, 130)
_HUMIDITY = (
    (-1e-5, 6e-5),
    (-2e-4, 1.8e-3),
    (-1e-3, 0.018),
    (-1e-3, 0.022),
    (-1.5e-3, 0.028),
    (-2e-3, 0.035),
    (-2e-3, 0.040),
)


def _pressure_levels() -> tuple[Channel, ...]:
    wind = tuple((-speed, speed) for speed in _WIND)
    variables = (
        ("z", "m2 s-2", _GEOPOTENTIAL),
        ("t", "K", _TEMPERATURE),
        ("u", "m s-1", wind),
        ("v", "m s-1", wind),
        ("q", "kg kg-1", _HUMIDITY),
    )
    return tuple(
        Channel(f"{variable}{level}", units, float(low), float(high))
        for variable, units, bounds in variables
        for level, (low, high) in zip(LEVELS, bounds, strict=True)
    )


RT38: tuple[Channel, ...] = (
    *_pressure_levels(),
    Channel("tisr", "J m-2", -1e5, 3.2e7),  # of one hour up to 5.1e6, of six up to 2.8e7
    Channel("t2m", "K", 165.0, 345.0),
    Channel("tp", "m", -0.1, 7.0, PRECIPITATION_TRANSFORM),  # 7.0 is 1.1 m
)
CHANNEL_SETS: dict[str, tuple[Channel, ...]] = {"rt38": RT38}

_BY_NAME = {channel.name: channel for channel in RT38}


def channels_of(name: str) -> tuple[Channel, ...]:
    """The channels of a named set, in the order in which they are stored.

    Raises:
        DataError: an unknown set.

    >>> [channel.name for channel in channels_of("rt38")][::6]
    ['z50', 'z925', 't850', 'u700', 'v600', 'q500', 't2m']
    """
    if name not in CHANNEL_SETS:
        raise DataError(f"there is no set of channels {name!r}; {known_names(name, CHANNEL_SETS)}")
    return CHANNEL_SETS[name]


def known_channel(name: str) -> Channel | None:
    """The channel of that name, or None where none is known.

    >>> known_channel("z500").units
    'm2 s-2'
    >>> known_channel("heat") is None
    True
    """
    return _BY_NAME.get(name)
