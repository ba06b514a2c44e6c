"""How a gate learns and how wrong experts are kept from learning: the options, and the quantile that fits a layer.

Dimensions: N experts, K selected.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from smoe_hpc.config.working_range import out_of_range
from smoe_hpc.errors import ConfigError

ERROR_SCALES = ("none", "loss_weight", "running_mean")

# With irreducible error the share of selections called correct is the quantile, and a selection is kept while its own
# share exceeds K / N. Measured on the noisy heat experiment (docs/noisy_heat.md): a little above K / N finds the regions,
# below it routing never settles, far above it the random start freezes.
_BALANCE = 1.1


def balanced_quantile(num_experts: int, selected: int) -> float:
    """The quantile a little above K / N at which a routing loss can both settle and move."""
    return min(_BALANCE * selected / num_experts, 0.5 * (1.0 + selected / num_experts))


@dataclass(frozen=True)
class RoutingLoss:
    """The routing classification loss (paper, section 3).

    Args:
        quantile: share of a sample's selections called correct, in (0, 1), or "balanced": a little above K / N.
        tolerance: added to the quantile of the error; in units of the loss's error (or of its running mean).
        error_scale: "none"; "loss_weight" divides the error at each pixel by the weight the loss gives it there (set with
            :meth:`SpatialMoE2d.set_loss_weight`, e.g. cos latitude); "running_mean" divides it by a running mean of
            itself at each pixel, for data whose irreducible error depends on place; :func:`smoe_hpc.layers.end_step`
            keeps that mean, so it must be called after each step.
    """

    quantile: str | float = "balanced"
    tolerance: float = 1e-5
    error_scale: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.quantile, str):
            if self.quantile != "balanced":
                raise ConfigError(f"routing_loss.quantile={self.quantile!r}: give a number in (0, 1) or 'balanced'")
        else:
            _check_quantile("routing_loss", self.quantile)
        if not self.tolerance >= 0:
            raise ConfigError(f"routing_loss.tolerance={self.tolerance} is negative; the published value is 1e-5")
        if self.error_scale not in ERROR_SCALES:
            raise ConfigError(
                f"routing_loss.error_scale={self.error_scale!r} is not known; choose one of {', '.join(ERROR_SCALES)}"
            )

    def quantile_for(self, num_experts: int, selected: int) -> float:
        """The quantile as a number, for a layer of these sizes; a UserWarning where it leaves the working range."""
        if isinstance(self.quantile, str):
            return balanced_quantile(num_experts, selected)
        what = out_of_range(self.quantile, num_experts, selected)
        if what is not None:
            warnings.warn(
                f"routing_loss.quantile={self.quantile:g} where {selected} of {num_experts} experts are selected: on data "
                f"with irreducible error {what}; use quantile='balanced'",
                stacklevel=4,
            )
        return float(self.quantile)


@dataclass(frozen=True)
class Damping:
    """Expert error damping (paper, section 3): the gradient of wrong selections is multiplied by ``factor``.

    Args:
        factor: 0 in the published heat run, which can leave an expert without any gradient for ever (docs/heat.md); 0.1 is
            reported too; 1 leaves the gradient as it is.
        tolerance: added to the quantile of the error, in units of the loss's error.
        quantile: share of a sample's selections that is not damped; None takes the routing loss's.
    """

    factor: float = 0.05
    tolerance: float = 1e-3
    quantile: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise ConfigError(f"damping.factor={self.factor}: give a number of at least 0, e.g. 0.1")
        if not self.tolerance >= 0:
            raise ConfigError(f"damping.tolerance={self.tolerance} is negative; the published value is 1e-3")
        if self.quantile is not None:
            _check_quantile("damping", self.quantile)


def _check_quantile(where: str, quantile: float) -> None:
    if not 0.0 < quantile < 1.0:
        raise ConfigError(f"{where}.quantile={quantile}: give a number between 0 and 1, both excluded")
