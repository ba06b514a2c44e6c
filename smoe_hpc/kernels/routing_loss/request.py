"""The arguments that all implementations of the operators take."""

from __future__ import annotations

from typing import NamedTuple


class Request(NamedTuple):
    """What to find in the gradient of a layer's output, in the order of the operator's schema.

    Args:
        filters: F, per expert.
        quantile, tolerance: of the labels; quantile None: no counts. Tolerances are in units of the error.
        damping_quantile, damping_tolerance, damping_factor: of damping; quantile None: no damped gradient.
        each: counts of each sample are wanted, not their sum.
        wants_errors: whether sums of the undivided errors are.
    """

    filters: int
    quantile: float | None
    tolerance: float
    damping_quantile: float | None
    damping_tolerance: float
    damping_factor: float
    each: bool
    wants_errors: bool
