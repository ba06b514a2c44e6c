"""The numbers of the routing loss and of damping for one layer."""

from __future__ import annotations

from dataclasses import dataclass

from smoe_hpc.errors import ConfigError


@dataclass(frozen=True)
class RoutingLossRules:
    """What backward does with the gradient of a layer's output.

    Args:
        quantile: share of a sample's selections that are called correct, for the labels; None: no routing loss.
        tolerance: added to that quantile of the error.
        damping_quantile, damping_tolerance: the same for damping; ``damping_quantile`` None: no damping.
        damping_factor: what the gradient of a damped selection is multiplied with.

    Raises:
        ConfigError: a quantile outside 0..1, or a tolerance below 0.
    """

    quantile: float | None
    tolerance: float = 1e-5
    damping_quantile: float | None = None
    damping_tolerance: float = 1e-3
    damping_factor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("quantile", "damping_quantile"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name}={share}: a quantile is a share; give a number from 0 to 1, or None")
        for name in ("tolerance", "damping_tolerance"):
            added = getattr(self, name)
            if not added >= 0.0:
                raise ConfigError(f"{name}={added}: a tolerance widens what counts as correct; give a number of at least 0")
