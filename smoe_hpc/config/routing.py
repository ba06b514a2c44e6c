"""How a gate learns and how wrong experts are kept from learning: sections of a recipe's model, and options of the layer.

:mod:`smoe_hpc.layers` exports both for networks of one's own. Dimensions: N experts, K selected experts. "Paper" is Dryden
and Hoefler, Spatial Mixture-of-Experts, NeurIPS 2022.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from smoe_hpc.config import rules
from smoe_hpc.config.working_range import balanced_quantile, out_of_range


@dataclass(frozen=True)
class RoutingLoss:
    """The loss that the gate learns from (paper, "Routing classification loss").

    Attributes:
        quantile: share of a sample's selections that count as correct, above 0 and below 1; "balanced" is a little above
            K/N, the only place where routing both learns and settles on data with irreducible error.
        tolerance: added to the quantile of the error, in units of the error (or of its running mean); not negative.
        error_scale: what the error is divided by before the quantile: "none" (published); "loss_weight", the weight that the
            loss gives the pixel, such as cos(latitude) (`SpatialMoE2d.set_loss_weight`); "running_mean", the mean of the
            error at the pixel over past steps, for data whose irreducible error depends on the place (`end_step` keeps it).
        importance: weight of the auxiliary loss that evens out the gate's sums over experts; not negative.
        load: weight of the auxiliary loss that evens out how often experts are selected; not negative; needs gate
            noise.
        spatial_agreement: weight of the auxiliary loss that draws the gate's values of different samples together; not
            negative.

    Raises:
        ConfigError: a value outside its range.
    """

    quantile: Literal["balanced"] | float = "balanced"
    tolerance: float = 1e-5
    error_scale: Literal["none", "loss_weight", "running_mean"] = "none"
    importance: float = 0.0
    load: float = 0.0
    spatial_agreement: float = 0.0

    def __post_init__(self) -> None:
        rules.check_choices(self, "routing_loss.")
        if isinstance(self.quantile, str):
            rule = "must be balanced or a number, e.g. 0.5"
            rules.require(self.quantile == "balanced", "routing_loss.quantile", self.quantile, rule)
        else:
            rules.check_quantile("routing_loss.quantile", self.quantile)
        for key in ("tolerance", "importance", "load", "spatial_agreement"):
            rules.check_not_negative(f"routing_loss.{key}", getattr(self, key))

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
    """How much of the gradient reaches an expert through a wrong selection (paper, "Expert error damping").

    Attributes:
        factor: what the gradient of a wrong selection is multiplied by, from 0 to 1. 0 (the published heat command) can leave
            an expert without any gradient for ever, see docs/heat.md; 0.1 is also reported; 1 leaves the gradient as it is.
        tolerance: added to the quantile of the error, in units of the error; not negative.
        quantile: share of a sample's selections that is not damped, above 0 and below 1; null takes the routing loss's, and
            without a routing loss there is no damping.

    Raises:
        ConfigError: a value outside its range.
    """

    factor: float = 0.05
    tolerance: float = 1e-3
    quantile: float | None = None

    def __post_init__(self) -> None:
        rule = "must lie in 0 to 1: 0 stops the gradient of a wrong selection, 1 leaves it alone; e.g. 0.05"
        rules.require(0 <= self.factor <= 1, "damping.factor", self.factor, rule)
        rules.check_not_negative("damping.tolerance", self.tolerance)
        if self.quantile is not None:
            rules.check_quantile("damping.quantile", self.quantile)
