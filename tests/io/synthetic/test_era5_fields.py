"""Synthetic fields: what they depend on, whether they look like weather, and whether they move like it."""

import doctest
import hashlib
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io.channels import RT38
from smoe_hpc.io.store.transforms import apply
from smoe_hpc.io.synthetic.era5 import SyntheticEarth, climate, global_grid, harmonics, sun

NAMES = [channel.name for channel in RT38]
HOUR = np.timedelta64(1, "h")


def at(name: str) -> int:
    return NAMES.index(name)


def hours(*count: int, start: str = "2016-01-01T00") -> list[np.datetime64]:
    return [np.datetime64(start) + number * HOUR for number in count]


@pytest.fixture(scope="module")
def earth() -> SyntheticEarth:
    return SyntheticEarth(global_grid(64, 128), seed=5)


@pytest.fixture(scope="module")
def year(earth) -> np.ndarray:
    """[73, C, H, W]: every fifth day of 2016, at changing hours of the day."""
    return np.stack([earth.fields(time) for time in hours(*range(0, 8760, 121))])


@pytest.fixture(scope="module")
def weights(earth) -> np.ndarray:
    return earth.grid.cos_latitude_weights()


@pytest.mark.parametrize("name", ["channels", *(f"synthetic.era5.{name}" for name in ("fields", "folder", "harmonics", "sun"))])
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"smoe_hpc.io.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# What a field depends on


def test_a_time_needs_no_other_time(earth):
    wanted = hours(5000)[0]
    alone = SyntheticEarth(global_grid(64, 128), seed=5).fields(wanted)
    for time in hours(0, 4990, 9000, 4800, 5001, start="2016-01-01T00"):
        earth.fields(time)
    np.testing.assert_array_equal(earth.fields(wanted), alone)


def test_seeds_differ_in_weather_and_continents(earth):
    time = hours(100)[0]
    other = SyntheticEarth(global_grid(64, 128), seed=6)
    assert (earth.constants["land_sea_mask"] - other.constants["land_sea_mask"]).std() > 0.3
    wind = at("v500")
    assert abs(np.corrcoef(earth.fields(time)[wind].ravel(), other.fields(time)[wind].ravel())[0, 1]) < 0.3


def test_a_coarse_grid_shows_the_same_weather(earth):
    time, coarse = hours(777)[0], SyntheticEarth(global_grid(32, 64), seed=5)
    fine = earth.fields(time)
    rows = 0.5 * (fine[:, ::2] + fine[:, 1::2])  # a coarse row lies between two fine ones, its columns on fine ones
    for name, alike in [("z500", 0.99), ("t850", 0.98), ("u250", 0.95), ("tisr", 0.999)]:
        assert np.corrcoef(coarse.fields(time)[at(name)].ravel(), rows[at(name), :, ::2].ravel())[0, 1] > alike


def test_the_bits_do_not_depend_on_the_number_of_threads(earth):
    script = (
        "import hashlib, numpy as np\n"
        "from smoe_hpc.io.synthetic.era5 import SyntheticEarth, global_grid\n"
        "earth = SyntheticEarth(global_grid(64, 128), seed=5)\n"
        "print(hashlib.sha256(earth.fields(np.datetime64('2016-05-05T18')).tobytes()).hexdigest())"
    )
    threads = {f"{library}_NUM_THREADS": "4" for library in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **threads}, capture_output=True, text=True, check=True
    )
    here = earth.fields(np.datetime64("2016-05-05T18"))
    assert done.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_impossible_earths_are_refused():
    with pytest.raises(DataError, match="8 x 16 points cannot be made; give at least 16x32"):
        global_grid(8, 16)
    with pytest.raises(DataError, match="seed -1 is negative"):
        SyntheticEarth(global_grid(16, 32), seed=-1)


# Magnitudes

# Approximate climatological magnitudes of the atmosphere, rounded and from general knowledge: area-weighted mean and
# standard deviation over space and a year. They say that units and sizes are right, not that this is the climate.
MAGNITUDES = {
    "z50": (2.0e5, 5e3),
    "z250": (1.03e5, 4.5e3),
    "z500": (5.5e4, 2.8e3),
    "z850": (1.42e4, 1.3e3),
    "t50": (211, 7),
    "t250": (225, 5),
    "t500": (257, 10),
    "t850": (281, 13),
    "u250": (13, 17),
    "u500": (7, 11),
    "u850": (1.5, 7),
    "v250": (0, 11),
    "v500": (0, 7.5),
    "v850": (0, 5),
    "q250": (4e-5, 3e-5),
    "q500": (1.1e-3, 9e-4),
    "q850": (6.5e-3, 4.2e-3),
    "tisr": (1.22e6, 1.5e6),
    "t2m": (287, 16),
    "tp": (6e-4, 1.6e-3),
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitudes_are_of_the_atmosphere(year, weights, name):
    mean, spread = MAGNITUDES[name]
    field = year[:, at(name)].astype(np.float64)
    found = (field * weights).mean()
    deviation = np.sqrt((np.square(field - found) * weights).mean())
    assert abs(found - mean) < max(0.5 * spread, 0.01 * mean)
    assert 0.5 * spread < deviation < 1.8 * spread


def test_a_year_stays_within_the_bounds_of_every_channel(year):
    for channel, low, high in zip(RT38, year.min(axis=(0, 2, 3)), year.max(axis=(0, 2, 3)), strict=True):
        low, high = apply(channel.transform, np.array([low, high]))
        reach = 0.04 * (channel.high - channel.low)
        assert low >= channel.low + (reach if low else 0), channel.name
        assert high <= channel.high - reach, channel.name
    assert year[:, at("q50") : at("tisr") + 1].min() >= 0
    assert np.isfinite(year).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_seeds_stay_within_the_bounds_too(seed):
    earth = SyntheticEarth(global_grid(32, 64), seed)
    for time in hours(*range(0, 8784 * 3, 397)):
        for channel, field in zip(RT38, earth.fields(time), strict=True):
            low, high = apply(channel.transform, np.array([field.min(), field.max()]))
            assert channel.low < low <= high < channel.high, (channel.name, time)


def test_land_is_a_third_smooth_and_up_to_5000_m_high(earth, weights):
    land, height = earth.constants["land_sea_mask"], earth.constants["orography"]
    assert (land * weights).mean() == pytest.approx(0.3, abs=0.03)
    assert (land.min(), land.max()) == pytest.approx((0, 1), abs=0.01)
    assert height.min() == 0
    assert height.max() == pytest.approx(5000, rel=1e-5)
    assert (height[land < 0.5] == 0).all()
    assert abs(np.diff(land, axis=1)).mean() < 0.1
    np.testing.assert_array_equal(earth.constants["latitude"][:, 3], earth.grid.lat.astype(np.float32))


def test_rain_is_rare_positive_and_skewed(year):
    rain = year[:, at("tp")]
    assert rain.min() == 0
    assert (rain < 1e-4).mean() > 0.5
    deviation = rain - rain.mean()
    assert (deviation**3).mean() / deviation.std() ** 3 > 3


# The atmosphere's own rules


def test_temperature_is_the_thickness_between_levels(earth):
    field = earth.fields(hours(3000)[0]).astype(np.float64)
    for upper, lower in [("500", "600"), ("600", "700")]:
        thickness = field[at(f"z{upper}")] - field[at(f"z{lower}")]
        warmth = 0.5 * (field[at(f"t{upper}")] + field[at(f"t{lower}")])
        expected = climate.GAS_CONSTANT * warmth * np.log(float(lower) / float(upper))
        np.testing.assert_allclose(thickness, expected, rtol=2e-3)


def test_wind_is_in_balance_with_pressure_away_from_the_equator(earth):
    field = earth.fields(hours(200)[0]).astype(np.float64)
    lat = np.deg2rad(earth.grid.lat)
    coriolis = 2 * climate.EARTH_ROTATION * np.sin(lat)[:, None]
    slope_east = np.roll(field[at("z500")], -1, axis=1) - np.roll(field[at("z500")], 1, axis=1)
    slope_east /= 4 * np.pi / 128 * climate.EARTH_RADIUS * np.cos(lat)[:, None]
    slope_north = np.gradient(field[at("z500")], lat, axis=0) / climate.EARTH_RADIUS
    for rows in (slice(8, 22), slice(42, 56)):  # 67 to 28 degrees south, and north
        for name, geostrophic in [("v500", slope_east / coriolis), ("u500", -slope_north / coriolis)]:
            assert np.corrcoef(field[at(name)][rows].ravel(), geostrophic[rows].ravel())[0, 1] > 0.95


def test_the_ground_is_colder_higher_up_and_swings_more_over_land(earth, year):
    land, height = earth.constants["land_sea_mask"], earth.constants["orography"]
    warm = year[:, at("t2m")].mean(axis=0) - year[:, at("t925")].mean(axis=0)
    assert np.polyfit(height[height > 500], warm[height > 500], 1)[0] == pytest.approx(-6.5e-3, rel=0.2)
    days = np.stack([earth.fields(time)[at("t2m")] for time in hours(*range(0, 240, 3), start="2016-04-01T00")])
    swing = np.abs(np.fft.rfft(days, axis=0)[10])  # once a day
    middle = np.abs(earth.grid.lat) < 45
    assert swing[middle][land[middle] > 0.9].mean() > 4 * swing[middle][land[middle] < 0.1].mean()
    seasons = year[:, at("t2m")].reshape(73, -1).std(axis=0).reshape(land.shape)
    north = (earth.grid.lat > 30) & (earth.grid.lat < 70)
    assert seasons[north][land[north] > 0.9].mean() > 1.2 * seasons[north][land[north] < 0.1].mean()


def test_seasons_are_opposite_in_the_hemispheres(earth):
    january, july = (
        np.mean([earth.fields(time)[at("t850")] for time in hours(*range(0, 480, 30), start=start)], axis=(0, 2))
        for start in ("2016-01-10T00", "2016-07-10T00")
    )
    north, south = earth.grid.lat > 40, earth.grid.lat < -40
    assert (july - january)[north].mean() > 8
    assert (july - january)[south].mean() < -4


# The sun


def test_radiation_equals_a_fine_sum_over_the_hour_before():
    lat, lon = np.array([-89.0, -66.0, -30.0, 0.0, 45.0, 67.5, 88.0]), np.arange(0, 360, 7.5)
    for when in ("2016-01-01T00", "2016-03-20T06", "2016-06-21T23", "2016-12-21T12"):
        second = int(np.datetime64(when, "s").astype(int))
        declination, distance, equation = sun.orbit(sun.year_angle(second - 1800))
        total = np.zeros((len(lat), len(lon)))
        for ago in np.arange(0.5, 3600, 1.0):
            angle = np.deg2rad(lon) + (second - ago) % 86400 * (2 * np.pi / 86400) + equation - np.pi
            row = np.deg2rad(lat)[:, None]
            height = np.sin(row) * np.sin(declination) + np.cos(row) * np.cos(declination) * np.cos(angle)
            total += sun.SOLAR_CONSTANT * distance * height.clip(min=0)
        np.testing.assert_allclose(sun.past_hour(second, lat, lon), total, rtol=2e-4, atol=2e3)


def test_the_sun_is_where_the_calendar_says():
    def noon(date: str) -> float:
        second = int(np.datetime64(f"{date}T12:30", "s").astype(int))
        lat = np.linspace(-89.5, 89.5, 359)
        return float(lat[sun.past_hour(second, lat, np.array([0.0])).argmax()])

    assert noon("2015-06-21") == pytest.approx(23.4, abs=0.6)
    assert noon("2015-12-22") == pytest.approx(-23.4, abs=0.6)
    assert noon("2016-03-20") == pytest.approx(0, abs=0.8)
    east = np.arange(0.0, 360, 5)
    field = sun.past_hour(int(np.datetime64("2016-06-21T09:30", "s").astype(int)), np.array([-80.0, 0.0, 80.0]), east)
    assert (field[0] == 0).all()  # polar night
    assert (field[2] > 1e6).all()  # polar day
    assert east[field[1].argmax()] == 45  # where it is noon at 9 h UTC


# Waves


def test_functions_are_orthonormal_on_the_sphere():
    nodes, area = np.polynomial.legendre.leggauss(48)
    functions = harmonics.legendre(20, np.rad2deg(np.arcsin(nodes))).astype(np.float64)
    for m in (0, 1, 7, 20):
        products = np.einsum("nh,kh,h->nk", functions[m:, :, m], functions[m:, :, m], area)
        np.testing.assert_allclose(products, np.eye(21 - m) * (2 if m == 0 else 4), atol=1e-5)


@pytest.mark.parametrize("name", ["z500", "t500", "v500", "t2m", "q700"])
def test_the_spectrum_falls_with_the_wavenumber(earth, name):
    rows = slice(44, 54)  # 34 to 62 degrees north
    power = np.mean(
        [
            np.square(np.abs(np.fft.rfft(earth.fields(time)[at(name), rows].astype(np.float64), axis=-1))).mean(axis=0)
            for time in hours(*range(0, 4000, 200))
        ],
        axis=0,
    )
    bands = [power[a:b].mean() for a, b in [(3, 6), (6, 12), (12, 20), (20, 30)]]
    assert bands == sorted(bands, reverse=True)
    if name in ("z500", "t500"):
        slope = np.polyfit(np.log(np.arange(10, 30)), np.log(power[10:30]), 1)[0]
        assert -7 < slope < -2.5
    assert bands[0] > 10 * bands[3]


def test_there_is_no_seam_at_greenwich(year):
    for name in ("z500", "t850", "u250", "v850", "q700", "tisr", "t2m"):
        steps = np.abs(np.diff(year[:, at(name)].astype(np.float64), axis=-1, append=year[:, at(name), :, :1]))
        assert steps[..., -1].mean() < 1.5 * steps[..., :-1].mean()


def test_the_rows_next_to_the_poles_are_smooth(year):
    for name in ("z500", "t850", "z50", "t2m", "q700"):
        field = year[:, at(name)].astype(np.float64)
        waves = np.square(np.abs(np.fft.rfft(field, axis=-1))).mean(axis=0)
        for pole in (0, -1):
            assert waves[pole, 4:].sum() < 0.02 * waves[pole, 1:].sum()
            # across the pole lies the same row, half a turn away: the step to it is that between two rows
            across = np.abs(field[:, pole] - np.roll(field[:, pole], 64, axis=-1)).mean()
            assert across < 3 * np.abs(field[:, pole] - field[:, -2 if pole else 1]).mean()


# Forecasts


def rmse(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    return float(np.sqrt((np.square(a.astype(np.float64) - b) * weights).mean()))


@pytest.mark.parametrize("name", ["z500", "t850"])
def test_persistence_loses_skill_with_the_lead(earth, weights, name):
    starts = range(0, 6000, 300)
    leads = [6, 24, 72, 120, 240]
    errors = []
    for lead in leads:
        pairs = [(earth.fields(now)[at(name)], earth.fields(now + lead * HOUR)[at(name)]) for now in hours(*starts)]
        errors.append(np.mean([rmse(now, then, weights) for now, then in pairs]))
    assert errors[:4] == sorted(errors[:4])
    assert errors[1] > 1.6 * errors[0]
    assert errors[2] > 1.3 * errors[1]
    assert abs(errors[4] / errors[3] - 1) < 0.35  # nothing is left to lose


@pytest.mark.parametrize("lead", [24, 72])
def test_waves_carried_by_the_flow_beat_persistence(earth, weights, lead):
    m = np.arange(65)
    turned = np.exp(-1j * m * np.deg2rad(climate.drift(earth.grid.lat, m) * lead / 24))
    moved, stayed = [], []
    for now in hours(*range(0, 6000, 300)):
        before, after = earth.fields(now)[at("z500")], earth.fields(now + lead * HOUR)[at("z500")]
        forecast = np.fft.irfft(np.fft.rfft(before) * turned, n=128)
        moved.append(rmse(forecast, after, weights))
        stayed.append(rmse(before, after, weights))
    assert np.mean(moved) < 0.8 * np.mean(stayed)
