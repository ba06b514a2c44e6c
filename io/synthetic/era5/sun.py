"""Solar radiation at the top of the atmosphere, from the geometry of the Earth's orbit.

Declination, distance and the equation of time are the Fourier series of Spencer (1971), good to some hundredths of a
degree; the solar constant is 1361 W m-2.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math

import numpy as np

SOLAR_CONSTANT = 1361.0  # W m-2
_HOUR = math.pi / 12  # radians that the sun moves in an hour


def year_angle(second: int) -> float:
    """Angle in radians since the start of the calendar year, for a time in seconds since 1970 (UTC)."""
    time = np.datetime64(second, "s")
    year = time.astype("datetime64[Y]")
    start, end = (int(edge.astype("datetime64[s]").astype(np.int64)) for edge in (year, year + 1))
    return 2 * math.pi * (second - start) / (end - start)


def orbit(angle: float) -> tuple[float, float, float]:
    """Declination [radians], the squared ratio of the mean to the actual distance, equation of time [radians].

    >>> [round(value, 3) for value in orbit(0.0)]
    [-0.402, 1.035, -0.013]
    """
    c1, s1, c2, s2 = (f(k * angle) for k in (1, 2) for f in (math.cos, math.sin))
    c3, s3 = math.cos(3 * angle), math.sin(3 * angle)
    declination = 0.006918 - 0.399912 * c1 + 0.070257 * s1 - 0.006758 * c2 + 0.000907 * s2 - 0.002697 * c3 + 0.00148 * s3
    distance = 1.00011 + 0.034221 * c1 + 0.00128 * s1 + 0.000719 * c2 + 0.000077 * s2
    equation = 0.000075 + 0.001868 * c1 - 0.032077 * s1 - 0.014615 * c2 - 0.040849 * s2
    return declination, distance, equation


def past_hour(second: int, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """[H, W] float32: J m-2 that arrived in the hour before a time, as ERA5 and WeatherBench accumulate it.

    The integral of the cosine of the zenith angle is exact, sunrise and sunset within the hour included.

    Args:
        second: end of the hour, seconds since 1970.
        latitude: [H] degrees.
        longitude: [W] degrees.
    """
    declination, distance, equation = orbit(year_angle(second - 1800))
    row = np.deg2rad(latitude)
    a, b = np.sin(row) * math.sin(declination), np.cos(row) * math.cos(declination)
    sunset = np.arccos(np.clip(-a / np.maximum(b, 1e-12), -1.0, 1.0))  # 0 in polar night, pi in polar day
    end = np.deg2rad(longitude) + second % 86400 / 3600 * _HOUR + equation - math.pi
    start = np.mod(end - _HOUR + math.pi, 2 * math.pi) - math.pi  # -pi is midnight, 0 noon
    single = [value.astype(np.float32)[:, None] for value in (a, b, sunset)]
    total = np.zeros((len(row), len(end)), dtype=np.float32)
    for turn in (0.0, 2 * math.pi):  # an hour that runs past midnight meets the next day's sun
        columns = slice(None) if not turn else np.flatnonzero(start + _HOUR > math.pi)
        early = (start[columns] - turn).astype(np.float32)
        total[:, columns] += _until(early + np.float32(_HOUR), *single) - _until(early, *single)
    total *= np.float32(SOLAR_CONSTANT * distance * 3600 / _HOUR)
    return np.maximum(total, 0.0, out=total)


def _until(hour_angle: np.ndarray, a: np.ndarray, b: np.ndarray, sunset: np.ndarray) -> np.ndarray:
    """Integral of a + b cos(h) from noon to an hour angle, as far as the sun is up."""
    up = np.clip(hour_angle, -sunset, sunset)
    return a * up + b * np.sin(up)
