"""The mean atmosphere that the waves ride on: vertical structure, zonal means, land, orography and seasons.

Everything hydrostatic rests on four vertical *modes* k with a horizontal field P_k each::

    geopotential = mean(p) + sum_k b_k(p) P_k          b_k(p) = b_k(1000 hPa) + R * integral of T_k over log pressure
    temperature  = mean(p) + sum_k T_k(p) P_k
    wind         = sum_k b_k(p) (U_k, V_k)             (U_k, V_k) the wind in balance with P_k

so that temperature is the thickness it must be, whatever the fields are. The modes are the warmth of the troposphere
(P in K), the pressure at the ground (m2 s-2), the stratospheric vortex (K) and the warmth near the ground (K, without a
wind of its own). Zonal means are set by their jets and integrated to balance. The numbers are approximate
climatological magnitudes, chosen by hand; nothing was fitted to a data set.

Dimensions: H latitude rows, W longitude columns, n degree, M zonal wavenumbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smoe_hpc.io.channels import LEVELS
from smoe_hpc.io.synthetic.era5 import harmonics

GAS_CONSTANT = 287.05  # J kg-1 K-1
EARTH_RADIUS = 6.371e6  # m
EARTH_ROTATION = 7.292e-5  # rad s-1
LAPSE_RATE = 6.5e-3  # K m-1
WARMTH, GROUND, VORTEX, SURFACE = range(4)

_NODES = np.array([1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100, 70, 50], dtype=np.float64)
_MEAN_TEMPERATURE = np.array(
    [287.5, 284, 280.5, 272.5, 265, 256.5, 245, 231.5, 225, 219, 213, 204.5, 206.5, 211], dtype=np.float64
)
_MODE_TEMPERATURE = np.array(
    [
        [1.15, 1.15, 1.1, 1.0, 0.97, 0.95, 0.9, 0.65, 0.45, 0.0, -0.4, -0.5, -0.4, -0.3],
        [0, 0, 0, 0, 0, 0, 0, 0, -2e-3, -1.6e-3, -1.2e-3, -1e-3, -1e-3, -1e-3],
        [0, 0, 0, 0, 0, 0, 0, 0, 0.2, 0.3, 0.45, 0.7, 0.9, 1.0],
        [1.0, 0.8, 0.55, 0.2, 0.08, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
_MODE_AT_1000 = np.array([0.0, 1.0, 0.0, -35.0])
_GEOPOTENTIAL_AT_1000 = 980.0  # m2 s-2, mean over the sphere

_LAND_SHARE = 0.3
_HIGHEST = 5000.0  # m
_LAND_STREAM = 1000


@dataclass(frozen=True)
class Vertical:
    """Mean and modes at the pressure levels of the channels, and the temperatures at 1000 hPa.

    Args:
        geopotential: [7] m2 s-2.
        temperature: [7] K.
        mode_geopotential: [7, 4] b_k.
        mode_temperature: [7, 4] T_k.
        ground_temperature: K at 1000 hPa.
        mode_ground_temperature: [4] T_k at 1000 hPa.
    """

    geopotential: np.ndarray
    temperature: np.ndarray
    mode_geopotential: np.ndarray
    mode_temperature: np.ndarray
    ground_temperature: float
    mode_ground_temperature: np.ndarray


def vertical() -> Vertical:
    """The vertical structure, integrated hydrostatically by the trapezoidal rule."""
    thickness = -GAS_CONSTANT * np.diff(np.log(_NODES))

    def integrate(temperature: np.ndarray) -> np.ndarray:
        layers = 0.5 * (temperature[..., 1:] + temperature[..., :-1]) * thickness
        return np.concatenate([np.zeros((*temperature.shape[:-1], 1)), layers.cumsum(axis=-1)], axis=-1)

    at = [int(np.flatnonzero(level == _NODES)[0]) for level in LEVELS]
    return Vertical(
        geopotential=(_GEOPOTENTIAL_AT_1000 + integrate(_MEAN_TEMPERATURE))[at],
        temperature=_MEAN_TEMPERATURE[at],
        mode_geopotential=(_MODE_AT_1000[:, None] + integrate(_MODE_TEMPERATURE)).T[at],
        mode_temperature=_MODE_TEMPERATURE.T[at],
        ground_temperature=float(_MEAN_TEMPERATURE[0]),
        mode_ground_temperature=_MODE_TEMPERATURE[:, 0],
    )


def bump(latitude: np.ndarray, centre: float, width: float) -> np.ndarray:
    """1 at a latitude, falling to 1/e within ``width`` degrees."""
    return np.exp(-np.square((latitude - centre) / width))


@dataclass(frozen=True)
class ZonalMeans:
    """Zonal means of the balanced modes as ``mean + winter * season``, season 1 in the north's mid-winter, -1 in summer.

    Args:
        field: [2, 3, H] P_k (mean and seasonal part of warmth, ground, vortex).
        wind: [2, 3, H] U_k.
    """

    field: np.ndarray
    wind: np.ndarray


def zonal_means(latitude: np.ndarray, levels: Vertical) -> ZonalMeans:
    """Jets of the three modes and the fields in balance with them, whose mean over the sphere is zero.

    Args:
        latitude: [H] degrees.
        levels: gives the wind that one unit of a mode has at 250 and 50 hPa.
    """
    fine = np.linspace(-90, 90, 3601)
    jet_250 = levels.mode_geopotential[LEVELS.index(250), WARMTH]
    jet_50 = levels.mode_geopotential[LEVELS.index(50), VORTEX]
    north, south = bump(fine, 38, 17), bump(fine, -42, 19)
    ground = -6 * (bump(fine, 13, 9) + bump(fine, -13, 9)) + 6 * bump(fine, 48, 13) + 9 * bump(fine, -50, 12)
    polar = bump(fine, 62, 14), bump(fine, -62, 14)
    winds = np.array(
        [
            [30 * (north + south) / jet_250, ground, (6 * polar[0] + 9 * polar[1]) / jet_50],
            [
                (10.5 * north - 3.5 * south) / jet_250,
                2 * bump(fine, 48, 13) - bump(fine, -50, 12),
                (14 * polar[0] - 16 * polar[1]) / jet_50,
            ],
        ]
    )
    coriolis = 2 * EARTH_ROTATION * np.sin(np.deg2rad(fine))
    slope = -EARTH_RADIUS * coriolis * winds
    steps = 0.5 * (slope[..., 1:] + slope[..., :-1]) * np.deg2rad(fine[1] - fine[0])
    fields = np.concatenate([np.zeros((2, 3, 1)), steps.cumsum(axis=-1)], axis=-1)
    area = np.cos(np.deg2rad(fine))
    fields -= ((fields * area).sum(axis=-1) / area.sum())[..., None]

    def on_rows(values: np.ndarray) -> np.ndarray:
        return np.array([[np.interp(latitude, fine, row) for row in part] for part in values])

    return ZonalMeans(on_rows(fields), on_rows(winds))


def drift(latitude: np.ndarray, m: np.ndarray) -> np.ndarray:
    """[H, M] angular speed of the waves in degrees a day, eastward.

    The flow carries them (fastest near 50 degrees, slowly westward at the equator) and long waves fall behind it as
    Rossby waves do, so that the longest hardly move.
    """
    x = np.square(np.sin(np.deg2rad(latitude)))[:, None]
    return -2.0 + 24.0 * x * (1.5 - x) - 400.0 / (np.square(m) + 60.0) * (1.0 - x)


@dataclass(frozen=True)
class Land:
    """Where land is and how high; the same for every time.

    Args:
        share: [H, W] 0..1.
        orography: [H, W] metres above the sea, 0 at sea.
        relief: [H, M] complex64, Fourier rows of the smoothed continents (mean 0, variance 1), positive over land.
    """

    share: np.ndarray
    orography: np.ndarray
    relief: np.ndarray


def make_land(seed: int, functions: np.ndarray, latitude: np.ndarray, width: int) -> Land:
    """Smooth random continents over 30 % of the sphere, up to 5000 m high.

    Args:
        seed: other seeds, other continents.
        functions: [n, H, M] of :func:`~smoe_hpc.io.synthetic.era5.harmonics.legendre`.
        latitude: [H] degrees.
        width: W.
    """
    degree = len(functions) - 1
    coefficients = harmonics.draw_coefficients(seed, _LAND_STREAM, 0, 1)
    amplitude = harmonics.spectrum(3.0, 2.6, degree)[None]
    height = harmonics.to_grid(harmonics.synthesise(functions, coefficients, amplitude), width)[0].astype(np.float64)
    area = np.repeat(np.cos(np.deg2rad(latitude)), width)
    order = np.argsort(height, axis=None, kind="stable")
    covered = area[order].cumsum() / area.sum()
    coast = height.flat[order[np.searchsorted(covered, 1 - _LAND_SHARE)]]
    share = 1 / (1 + np.exp(-(height - coast) / 0.05))
    above = np.clip((height - coast) / (height.max() - coast), 0, 1)
    smooth = amplitude * (np.arange(degree + 1) <= 10)
    smooth /= np.sqrt((np.square(smooth) * (2 * np.arange(degree + 1) + 1)).sum())
    relief = harmonics.synthesise(functions, coefficients, smooth)[0]
    return Land(share, _HIGHEST * above**1.8, relief)
