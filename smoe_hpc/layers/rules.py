"""How a gate learns and how wrong experts are kept from learning: what a layer asks of its backward.

The options :class:`RoutingLoss` and :class:`Damping` are those of a recipe, too. Dimensions: N experts, K selected.
"""

from __future__ import annotations

from smoe_hpc.config.routing import Damping, RoutingLoss
from smoe_hpc.config.working_range import balanced_quantile
from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import RoutingLossRules
from smoe_hpc.layers.gates.auxiliary import AuxiliaryLosses

__all__ = ["Damping", "RoutingLoss", "auxiliary_losses", "balanced_quantile", "refuse_other_losses", "routing_loss_rules"]


def routing_loss_rules(
    num_experts: int, selected: int, routing_loss: RoutingLoss | None, damping: Damping | None
) -> RoutingLossRules:
    """What a layer of these sizes and options asks of its backward; nothing, where all experts are selected.

    Raises:
        ConfigError: damping has no quantile.
    """
    if selected == num_experts:
        return RoutingLossRules(quantile=None)
    quantile = routing_loss.quantile_for(num_experts, selected) if routing_loss is not None else None
    tolerance = routing_loss.tolerance if routing_loss is not None else 0.0
    if damping is None or damping.factor == 1.0:
        return RoutingLossRules(quantile, tolerance)
    damping_quantile = damping.quantile if damping.quantile is not None else quantile
    if damping_quantile is None and damping != Damping():
        raise ConfigError("damping without a routing loss needs a quantile of its own, e.g. Damping(quantile=0.7)")
    return RoutingLossRules(
        quantile=quantile,
        tolerance=tolerance,
        damping_quantile=damping_quantile,
        damping_tolerance=damping.tolerance,
        damping_factor=damping.factor,
    )


def auxiliary_losses(routing_loss: RoutingLoss | None) -> AuxiliaryLosses | None:
    """Weights of the auxiliary losses that a routing loss gives its gate; None without a routing loss."""
    if routing_loss is None:
        return None
    return AuxiliaryLosses(routing_loss.importance, routing_loss.load, routing_loss.spatial_agreement)


def refuse_other_losses(routing_loss: RoutingLoss | None, gate_losses: AuxiliaryLosses) -> None:
    """Auxiliary losses belong to the gate, which other layers may share: a layer's must not differ from those it has.

    Raises:
        ConfigError: they do.
    """
    losses = auxiliary_losses(routing_loss)
    if losses and losses != gate_losses:
        raise ConfigError(
            f"the routing loss has the auxiliary losses {losses}, its gate {gate_losses}; make the gate with "
            "auxiliary=AuxiliaryLosses(...) of the same weights, or leave them out of RoutingLoss"
        )
