"""Counts, means and squares of fields, exact to rounding however the fields are cut.

Moments are merged by the rule of Chan, Golub and LeVeque (1979).

Dimensions: n samples, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Moments:
    """Count of values, mean [C] and sum of squared distances from it [C], float64."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, fields: np.ndarray) -> Moments:
        """Moments of one slab [n, C, H, W], in two passes over each field while it is in the processor's cache."""
        samples, channels, height, width = fields.shape
        points = height * width
        mean, squares = np.zeros((2, samples, channels))
        with np.errstate(invalid="ignore", over="ignore"):  # a field that is not finite shows in its squares
            for n in range(samples):
                for channel in range(channels):
                    values = fields[n, channel].astype(np.float64).reshape(-1)
                    mean[n, channel] = values.mean()
                    values -= mean[n, channel]
                    squares[n, channel] = np.dot(values, values)
        total = cls(points, mean[0], squares[0])
        for n in range(1, samples):
            total = total.merge(cls(points, mean[n], squares[n]))
        return total

    def merge(self, other: Moments) -> Moments:
        """Moments of both together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart**2 * (self.count / count * other.count)
        return Moments(count, mean, squares)
