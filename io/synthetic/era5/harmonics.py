"""Random waves on the sphere that drift eastward, live for some days and give way to others.

A *slab* is a random field of spherical harmonics with a number s, drawn from (seed, band, s) alone. It lives around its
own time s * D, from (s - 1) D to (s + 1) D, with the weight cos(pi/2 * age / D), so that two slabs are alive at any time
and the squares of their weights sum to one. While it lives, each zonal wavenumber of each latitude row is carried along
by a speed of its own. As slabs are finite, the shear of the flow cannot wind them up however late the time is; as they
are numbered, any time can be had without the times before.

Spherical harmonics vanish toward the poles as the sphere demands, so nothing is noisy there, and coefficients are drawn
for the largest truncation and cropped, so that coarse and fine grids show the same weather. Sums are written out in
numpy rather than given to a linear-algebra library, whose last bits depend on its number of threads.

Dimensions: n degree, M zonal wavenumbers, H latitude rows, W longitude columns, V random variables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.fft import irfft

MAX_DEGREE = 84  # the largest whose products a grid of 128 x 256 resolves
_KEPT_SLABS = 3
_SECONDS_PER_DAY = 86400.0


def truncation(height: int, width: int) -> int:
    """Largest degree that a grid holds with room to spare: a third of its circumference.

    >>> truncation(128, 256), truncation(32, 64)
    (84, 21)
    """
    return min(MAX_DEGREE, (min(2 * height, width) - 1) // 3)


def legendre(degree: int, latitude: np.ndarray) -> np.ndarray:
    """[n, H, M] float32: associated Legendre functions whose squares, times cos^2 and sin^2, average 1 on the sphere.

    Args:
        degree: largest degree; n and M run from 0 to it, and what has M > n is zero.
        latitude: [H] degrees.
    """
    x, y = np.sin(np.deg2rad(latitude)), np.cos(np.deg2rad(latitude))
    p = np.zeros((degree + 1, len(x), degree + 1))
    p[0, :, 0] = 1.0
    for n in range(1, degree + 1):
        p[n, :, n] = y * p[n - 1, :, n - 1] * math.sqrt(3.0 if n == 1 else (2 * n + 1) / (2 * n))
        m = np.arange(n)
        a = np.sqrt((4.0 * n * n - 1) / (n * n - m * m))
        b = np.sqrt(np.maximum((n - 1.0) ** 2 - m * m, 0.0) / (4.0 * (n - 1) ** 2 - 1)) if n > 1 else np.zeros(1)
        p[n, :, :n] = a * (x[:, None] * p[n - 1, :, :n] - (b * p[n - 2, :, :n] if n > 1 else 0.0))
    return p.astype(np.float32)


def draw_coefficients(seed: int, stream: int, number: int, count: int) -> np.ndarray:
    """[V, n, M] complex128 of variance 1 in either part, for the largest truncation; ``count`` is V."""
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, number % (1 << 64)])))
    parts = draw.standard_normal((count, MAX_DEGREE + 1, MAX_DEGREE + 1, 2))
    return parts[..., 0] - 1j * parts[..., 1]


def synthesise(functions: np.ndarray, coefficients: np.ndarray, amplitude: np.ndarray) -> np.ndarray:
    """[V, H, M] complex64: rows of Fourier coefficients, to be summed by :func:`to_grid`.

    Args:
        functions: [n, H, M] of :func:`legendre`.
        coefficients: [V, n, M] of :func:`draw_coefficients`, cropped here.
        amplitude: [V, n] of every coefficient of a degree; the variance of the field is the sum of its squares times
            2n + 1.
    """
    degree = len(functions) - 1
    shares = coefficients[:, : degree + 1, : degree + 1] * amplitude[:, : degree + 1, None]
    shares[:, :, 1:] *= 0.5  # a real field has every wave but the mean twice
    shares[:, :, 0] = shares[:, :, 0].real
    parts = np.stack([shares.real, shares.imag]).astype(np.float32)  # real sums are faster than complex ones
    sums = np.zeros((2, len(amplitude), functions.shape[1], degree + 1), dtype=np.float32)
    for n in np.flatnonzero(amplitude[:, : degree + 1].any(axis=0)):
        sums[..., : n + 1] += functions[n, :, : n + 1] * parts[:, :, n, None, : n + 1]
    rows = np.empty(sums.shape[1:], dtype=np.complex64)
    rows.real, rows.imag = sums
    return rows


def to_grid(rows: np.ndarray, width: int) -> np.ndarray:
    """[..., H, W] float32 from [..., H, M] complex64; column j stands at longitude j * 360 / W."""
    return irfft(rows, n=width, axis=-1, norm="forward")


def spectrum(peak: float, tail: float, degree: int, first: int = 1, last: int = MAX_DEGREE) -> np.ndarray:
    """[n] amplitude of coefficients whose variance by degree is x^2 / (1 + x^2)^(1 + tail/2), x = n / peak, and sums to 1.

    The sum is over all degrees up to :data:`MAX_DEGREE`, whatever ``degree`` is kept: a coarse grid shows the same
    waves without the shortest.

    Args:
        peak: degree about which most variance lies.
        tail: far beyond the peak, variance falls as n^-tail (kinetic energy as n^(2 - tail) for a geopotential).
        degree: largest degree kept.
        first: degrees below have nothing.
        last: degrees above have nothing.
    """
    n = np.arange(MAX_DEGREE + 1)
    x = (n / peak) ** 2
    variance = np.where((n >= first) & (n <= last), x / (1 + x) ** (1 + tail / 2), 0.0)
    return np.sqrt(variance / variance.sum() / (2 * n + 1))[: degree + 1]


@dataclass(frozen=True)
class Band:
    """Degrees that live equally long.

    Args:
        stream: number of its random stream.
        days: D, half the life of a slab.
        amplitude: [V, n] of its random variables.
    """

    stream: int
    days: float
    amplitude: np.ndarray

    @cached_property
    def degree(self) -> int:
        """Largest degree with anything in it."""
        return int(np.flatnonzero(self.amplitude.any(axis=0)).max())


class MovingWaves:
    """The random variables at any time.

    Args:
        seed: of the slabs.
        functions: [n, H, M] of :func:`legendre`.
        bands: who lives how long; all have the same V.
        speed: from zonal wavenumbers [M] to the angular speed [H, M] in degrees a day, eastward.
    """

    def __init__(
        self, seed: int, functions: np.ndarray, bands: tuple[Band, ...], speed: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self._seed, self._functions, self._bands = seed, functions, bands
        m = np.arange(functions.shape[2])
        # radians a second by which the phase of a wave of this wavenumber falls back
        self._turning = np.deg2rad(speed(m)) * m / _SECONDS_PER_DAY
        self._slabs: dict[tuple[int, int], np.ndarray] = {}

    def at(self, second: int) -> np.ndarray:
        """[V, H, M] complex64 at a time in seconds since 1970; each variable has variance 1 on every latitude."""
        first = self._bands[0].amplitude
        rows = np.zeros((len(first), *self._turning.shape), dtype=np.complex64)
        for band in self._bands:
            life = band.days * _SECONDS_PER_DAY
            waves = band.degree + 1
            turning = self._turning[:, :waves]
            before = math.floor(second / life)
            for number in (before, before + 1):
                age = second - number * life
                angle = (turning * age).astype(np.float32)
                moved = np.empty(angle.shape, dtype=np.complex64)
                np.cos(angle, out=moved.real)
                np.sin(-angle, out=moved.imag)
                moved *= np.float32(math.cos(0.5 * math.pi * age / life))
                rows[:, :, :waves] += self._slab(band, number) * moved
        return rows

    def _slab(self, band: Band, number: int) -> np.ndarray:
        key = (band.stream, number)
        if key not in self._slabs:
            kept = [other for other in self._slabs if other[0] == band.stream]
            if len(kept) >= _KEPT_SLABS:
                del self._slabs[max(kept, key=lambda other: abs(other[1] - number))]  # the furthest in time
            coefficients = draw_coefficients(self._seed, band.stream, number, len(band.amplitude))
            functions = self._functions[: band.degree + 1, :, : band.degree + 1]
            self._slabs[key] = synthesise(functions, coefficients, band.amplitude)
        return self._slabs[key]
