"""All channels at a time: random waves, mean state, land and sun put together.

What a model can learn here: waves drift with a speed that depends on the latitude and on their length, they weaken over
land, warmth and pressure move together with a tilt, wind is what balances pressure (with friction over land), the
ground's temperature follows sun, land and height, and it rains where moist air flows poleward or uphill.

Arrays are float32 and each step works on all of one small field, because those stay in the processor's cache.

Dimensions: C channels, H latitude rows, W longitude columns, M zonal wavenumbers, V random variables.
"""

from __future__ import annotations

import math

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.channels import LEVELS, RT38
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.synthetic.era5 import climate, sun
from smoe_hpc.io.synthetic.era5.climate import EARTH_RADIUS, EARTH_ROTATION, GROUND, VORTEX, WARMTH
from smoe_hpc.io.synthetic.era5.harmonics import Band, MovingWaves, legendre, spectrum, to_grid, truncation

# The random variables: warmth of the troposphere, pressure at the ground, vortex, warmth near the ground, moisture.
_LONG_LIFE, _SHORT_LIFE = 8.0, 3.0  # days
_LONGEST_LIVED = 40  # degree above which nothing lives long

_EQUATORIAL_SPEED = 40.0  # m s-1: how fast a wave must run for pressure and zonal wind to rise together
_MIDWINTER = math.radians(20.0)
# Humidity: pressure in Pa, temperature above which air holds no more vapour, curve over water or ice
_WARMEST = (260.0, 250.0, 275.0, 281.0, 288.0, 297.0, 302.0)
_WATER = (17.67, 29.65, 17.67 * 243.5)
_ICE = (22.46, 0.53, 22.46 * 272.62)
_RELATIVE = (0.0, 0.28, 0.42, 0.46, 0.52, 0.68, 0.74)
_RELATIVE_SPREAD = (0.0, 0.13, 0.19, 0.19, 0.19, 0.14, 0.11)


def global_grid(height: int, width: int) -> Grid:
    """H x W points of equal spacing, rows half a step from the poles, the first column at Greenwich (WeatherBench).

    Raises:
        DataError: fewer than 16 x 32 points.

    >>> global_grid(128, 256).describe()
    '128 x 256 latlon, lat -89.2969..89.2969, lon 0..358.594, round the Earth'
    """
    if height < 16 or width < 32:
        raise DataError(f"a synthetic Earth of {height} x {width} points cannot be made; give at least 16x32")
    return Grid("latlon", -90 + 180 / height * (np.arange(height) + 0.5), np.arange(width) * 360 / width)


class SyntheticEarth:
    """Fields of the 38 channels in physical units, and the constants.

    >>> earth = SyntheticEarth(global_grid(16, 32), seed=0)
    >>> earth.fields(np.datetime64("2016-02-29T06")).shape
    (38, 16, 32)

    Args:
        grid: of :func:`global_grid`.
        seed: of weather and continents.
    """

    def __init__(self, grid: Grid, seed: int = 0) -> None:
        if seed < 0:
            raise DataError(f"seed {seed} is negative; give 0 or more")
        self.grid = grid
        height, width = grid.shape
        lat, radians = grid.lat, np.deg2rad(grid.lat)
        degree = truncation(height, width)
        functions = legendre(degree, lat)
        self._levels = climate.vertical()
        self._waves = MovingWaves(seed, functions, _bands(degree), lambda m: climate.drift(lat, m))
        self._zonal = climate.zonal_means(lat, self._levels)
        self._land = climate.make_land(seed, functions, lat, width)
        self.constants = {
            "land_sea_mask": self._land.share.astype(np.float32),
            "orography": self._land.orography.astype(np.float32),
            "latitude": np.repeat(lat.astype(np.float32)[:, None], width, axis=1),
        }

        sine, cosine = np.sin(radians), np.cos(radians)
        coriolis, least = 2 * EARTH_ROTATION * sine, 2 * EARTH_ROTATION * math.sin(math.radians(12))
        balance = coriolis / (coriolis**2 + least**2) / EARTH_RADIUS
        self._to_v = (1j * (balance / cosine)[:, None] * np.arange(degree + 1)).astype(np.complex64)
        self._to_u = _single(-balance / (2 * math.pi / height))[:, None]  # the difference of rows two apart
        self._equatorial = _single(climate.bump(lat, 0, 12) / _EQUATORIAL_SPEED)[:, None]
        self._equatorial_v = self._equatorial * (-0.7j * (np.arange(degree + 1) > 0)).astype(np.complex64)
        self._over_pole = (-1.0) ** np.arange(degree + 1, dtype=np.float32)
        self._hemisphere = np.tanh(2 * sine)
        stormy = np.square(sine) ** 1.5 * (1.4 - sine**4) / 0.545
        self._warm_spread = 4.1 * (0.2 + 0.85 * stormy)
        self._ground_spread = 650 * (0.12 + 0.9 * stormy)
        self._vortex_spread = 3.5 * np.square(sine) ** 2 + 0.4
        tilt = np.exp(-1j * np.pi / 3 * (np.arange(degree + 1) > 0))
        self._tilt = (0.6 * tilt).astype(np.complex64)

        relief = self._land.relief
        smooth = to_grid(relief, width)
        self._damping = (1 - 0.25 * np.tanh(smooth)).astype(np.float32)
        damped = np.fft.rfft(self._damping, axis=-1, norm="forward")[:, : degree + 1].astype(np.complex64)
        self._damping_wind = to_grid(np.stack(self._wind_of(damped, equatorial=False)), width)
        self._standing = relief * _single(np.square(sine) + 0.15)[:, None]
        self._prepare_surface(sine, cosine)

    def _prepare_surface(self, sine: np.ndarray, cosine: np.ndarray) -> None:
        """Maps of what happens near the ground."""
        land, height = self._land.share, self._land.orography
        rows = sine[:, None] ** 2
        self._ground_mean = _single(land * (3 - 12 * rows) + (1 - land) * (1.5 - 6 * rows))
        # the year's cycle: land swings more than the sea and turns earlier
        swing = -self._hemisphere[:, None] * rows
        sea = (1 - land) * (2 + 5 * rows)  # ice lets the polar sea swing more
        self._ground_season = (_single(swing * (12 * land + sea)), _single(swing * (2 * land + 3 * (1 - land))))
        self._ground_spread_2m = _single((0.35 + rows) * (0.8 + 1.7 * land))
        self._day = _single((0.5 + 6.5 * land) * (1 + height / 6000))
        self._lapse = _single(climate.LAPSE_RATE * height)
        drag = land * (0.45 + height / 12000)
        self._friction = {850: _single(1 - 0.4 * drag), 925: _single(1 - 0.75 * drag)}
        self._turning = {850: _single(0.15 * drag * sine[:, None]), 925: _single(0.4 * drag * sine[:, None])}
        east = np.roll(height, -1, axis=1) - np.roll(height, 1, axis=1)
        north = np.gradient(height, axis=0) * 2
        spacing = 2 * EARTH_RADIUS * math.pi / len(sine)
        self._uphill_east = _single(east / (spacing * np.maximum(cosine, 0.15)[:, None]) * 150)
        self._uphill_north = _single(north / spacing * 150)
        self._poleward = _single(self._hemisphere)[:, None]

    def fields(self, time: np.datetime64) -> np.ndarray:
        """[C, H, W] float32 at a time (UTC), physical units, channels in the order of ``RT38``."""
        out = np.empty((len(RT38), *self.grid.shape), dtype=np.float32)
        self.fill(time, out)
        return out

    def fill(self, time: np.datetime64, out: np.ndarray) -> None:
        """:meth:`fields` into the caller's [C, H, W] float32."""
        second = int(np.datetime64(time, "s").astype(np.int64))
        angle = sun.year_angle(second)
        season = math.cos(angle - _MIDWINTER)
        modes, (near_ground, moisture) = self._modes(second, season)
        day = self._daily_cycle(second, angle)
        ground = self._ground_mean + np.float32(season) * self._ground_season[0]
        ground += np.float32(math.sin(angle - _MIDWINTER)) * self._ground_season[1]
        ground += near_ground * self._ground_spread_2m
        ground += np.float32(0.35) * day
        fields = [mode[0] for mode in modes] + [ground]

        z, t, u, v, q = (out[7 * i : 7 * i + 7] for i in range(5))
        levels, work = self._levels, np.empty(self.grid.shape, dtype=np.float32)
        for level in range(len(LEVELS)):
            _combine(z[level], levels.geopotential[level], levels.mode_geopotential[level], fields, work)
            _combine(t[level], levels.temperature[level], levels.mode_temperature[level], fields, work)
            _combine(u[level], 0.0, levels.mode_geopotential[level], [mode[1] for mode in modes], work)
            _combine(v[level], 0.0, levels.mode_geopotential[level], [mode[2] for mode in modes], work)
        self._slow_near_ground(u, v, work)
        out[35] = sun.past_hour(second, self.grid.lat, self.grid.lon)
        _combine(out[36], levels.ground_temperature, levels.mode_ground_temperature, fields, work)
        out[36] += np.float32(0.65) * day
        out[36] -= self._lapse
        rising = self._rising(modes[WARMTH][2], u[6], v[6], moisture, season)
        self._humidity(q, t, rising, fields[VORTEX])
        _rain(out[37], rising, q[6])

    def _modes(self, second: int, season: float) -> tuple[list[np.ndarray], np.ndarray]:
        """Field, eastward and northward wind [3, H, W] of each balanced mode, and the two variables left [2, H, W]."""
        warmth, pressure, vortex, *others = self._waves.at(second)
        winter = _single(1 + 0.2 * season * self._hemisphere)[:, None]
        standing = self._standing * np.float32(season) * _single(self._hemisphere)[:, None]
        rows = np.empty((11, *warmth.shape), dtype=np.complex64)
        rows[0] = warmth * (_single(self._warm_spread)[:, None] * winter) - np.float32(1.2) * standing
        pressure = np.float32(0.8) * pressure + self._tilt * warmth
        rows[3] = pressure * (_single(self._ground_spread)[:, None] * winter) + np.float32(180) * standing
        calm = _single(self._vortex_spread * (1 + 0.7 * season * self._hemisphere))
        rows[6] = vortex * calm[:, None]
        for k in (WARMTH, GROUND, VORTEX):
            rows[3 * k + 1], rows[3 * k + 2] = self._wind_of(rows[3 * k])
        rows[9], rows[10] = others
        grids = to_grid(rows, self.grid.shape[1])
        modes = [grids[3 * k : 3 * k + 3] for k in (WARMTH, GROUND, VORTEX)]
        for k, mode in enumerate(modes):
            if k != VORTEX:  # waves weaken over land; their wind follows, by the rule for products
                slope = self._damping_wind * mode[0]
                mode *= self._damping
                mode[1:] += slope
            mode[0] += _single(self._zonal.field[0, k] + season * self._zonal.field[1, k])[:, None]
            mode[1] += _single(self._zonal.wind[0, k] + season * self._zonal.wind[1, k])[:, None]
        return modes, grids[9:]

    def _wind_of(self, rows: np.ndarray, equatorial: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Eastward and northward wind, Fourier rows [H, M], in balance with a field of such rows.

        Geostrophic, fading to nothing at the equator, where waves with wind along and ahead of the pressure take over.
        The neighbour of a pole's row is the same row half a turn away.
        """
        around = np.concatenate([rows[:1] * self._over_pole, rows, rows[-1:] * self._over_pole])
        east, north = self._to_u * (around[2:] - around[:-2]), self._to_v * rows
        if equatorial:
            east += self._equatorial * rows
            north += self._equatorial_v * rows
        return east, north

    def _daily_cycle(self, second: int, angle: float) -> np.ndarray:
        """[H, W] K by which the day warms the ground, warmest at 15 h local solar time, nothing in the polar night."""
        declination = sun.orbit(angle)[0]
        noon = np.cos(np.deg2rad(self.grid.lat) - declination).clip(min=0)
        midnight = (-np.cos(np.deg2rad(self.grid.lat) + declination)).clip(min=0)
        local = np.deg2rad(self.grid.lon) + (second % 86400 / 3600 - 15) * math.pi / 12
        shape = np.cos(local) + 0.2 * np.cos(2 * local)
        return self._day * (_single(noon - midnight)[:, None] * _single(shape))

    def _slow_near_ground(self, u: np.ndarray, v: np.ndarray, work: np.ndarray) -> None:
        """Over land, wind near the ground is weaker and turned toward low pressure."""
        for level, slower in self._friction.items():
            i, turned = LEVELS.index(level), self._turning[level]
            np.multiply(u[i], turned, out=work)
            work += v[i]
            u[i] -= turned * v[i]
            u[i] *= slower
            np.multiply(work, slower, out=v[i])

    def _rising(self, poleward: np.ndarray, u: np.ndarray, v: np.ndarray, moisture: np.ndarray, season: float) -> np.ndarray:
        """[H, W] how moist and rising the air is, about 0 on average and 1 in its spread."""
        lat = self.grid.lat
        belts = climate.bump(lat, -6 * season, 9) + 0.6 * climate.bump(abs(lat), 52, 20)
        belts -= 0.7 * climate.bump(abs(lat), 25, 10)
        jet = np.float32(0.4 * self._levels.mode_geopotential[LEVELS.index(500), WARMTH] / 10)
        rising = poleward * (self._poleward * jet)
        np.clip(rising, -1.5, 1.5, out=rising)
        rising += np.float32(0.8) * moisture
        rising += np.clip(self._uphill_east * u + self._uphill_north * v, -1.5, 1.5)
        rising += _single(belts)[:, None]
        return rising

    def _humidity(self, q: np.ndarray, t: np.ndarray, rising: np.ndarray, vortex: np.ndarray) -> None:
        """Specific humidity [7, H, W]: a relative humidity of what air can hold; a near-constant trace at 50 hPa."""
        north = np.square(np.sin(np.deg2rad(self.grid.lat)))
        np.multiply(vortex, np.float32(1.2e-8), out=q[0])
        q[0] += _single(2.4e-6 + 6e-7 * north)[:, None]
        for i in range(1, len(LEVELS)):
            high, below, slope = _WATER if LEVELS[i] > 500 else _ICE
            held = np.minimum(t[i], np.float32(_WARMEST[i]))
            held -= np.float32(below)
            np.divide(np.float32(-slope), held, out=held)
            held += np.float32(high + math.log(0.622 * 611.2 / (100 * LEVELS[i])))
            np.exp(held, out=held)
            np.multiply(rising, np.float32(_RELATIVE_SPREAD[i]), out=q[i])
            q[i] += np.float32(_RELATIVE[i])
            np.clip(q[i], np.float32(0.03), np.float32(1.0), out=q[i])
            q[i] *= held


def _rain(out: np.ndarray, rising: np.ndarray, humidity: np.ndarray) -> None:
    """Metres of six hours: nothing below a threshold, then steeply more, as much as the air is moist."""
    np.subtract(rising, np.float32(0.5), out=out)
    np.maximum(out, 0, out=out)
    out *= out
    out *= np.float32(0.15) * humidity + np.float32(3e-4)


def _combine(out: np.ndarray, mean: float, factors: np.ndarray, fields: list[np.ndarray], work: np.ndarray) -> None:
    """out = mean + sum of factor * field, leaving out what is zero."""
    started = False
    for factor, field in zip(factors.tolist(), fields, strict=False):  # wind has no part of the last mode
        if not factor:
            continue
        np.multiply(field, np.float32(factor), out=work if started else out)
        if started:
            out += work
        started = True
    if mean:
        out += np.float32(mean)


def _bands(degree: int) -> tuple[Band, Band]:
    """Long waves live long, short ones do not; where they meet, the squares of their shares sum to one."""
    n = np.arange(degree + 1)
    share = 1 / (1 + (n / 14) ** 6) * (n <= _LONGEST_LIVED)
    variables = np.stack(
        [
            spectrum(7.0, 5.0, degree),
            spectrum(7.0, 5.0, degree),
            spectrum(3.0, 5.0, degree, last=8),
            spectrum(9.0, 3.0, degree),
            spectrum(10.0, 3.0, degree),
        ]
    )
    return (
        Band(1, _LONG_LIFE, variables * np.sqrt(share)),
        Band(2, _SHORT_LIFE, variables * np.sqrt(1 - share)),
    )


def _single(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)
