"""Squared errors: the mean, and its root.

RMSE = sqrt(mean over samples and cells of w (f - t)^2) with w of mean 1: the root is taken last, over time and space
together, as in WeatherBench 1 and 2.
"""

from __future__ import annotations

import math

from torch import Tensor

from smoe_hpc.scores.accumulate import PointScore


class Mse(PointScore):
    """Mean squared error, in the square of the field's unit."""

    def quantity(self, output: Tensor, target: Tensor) -> Tensor:
        """(f - t)^2: [B, C, H, W] float64."""
        return (output.double() - target.double()).square()


class Rmse(Mse):
    """Root of the mean squared error, in the field's unit."""

    def finish(self, mean: float) -> float:
        """The root."""
        return math.sqrt(mean)
