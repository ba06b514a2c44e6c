"""Where the routing loss works: the one place that holds these numbers.

With noise in the target the share of selections called correct equals the quantile q by construction, and a selection
outranks the unselected experts only while its share exceeds K/N. A lower q re-routes for ever; a much higher one
freezes the random start. Source of the range: the tables of docs/noisy_heat.md, pixels on the right expert over
q and N/K.

Dimensions: N experts, K selected experts.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smoe_hpc.config.schema import Recipe

LOWEST = 1.0
"""Smallest working quantile, as a multiple of K/N."""

HIGHEST = 1.35
"""Largest working quantile, as a multiple of K/N."""

PUBLISHED_HEAT_QUANTILE = 0.3
"""Works at K/N = 1/3 although below it, because noiseless targets let the absolute tolerance settle the routing."""


def out_of_range(quantile: float, num_experts: int, selected: int) -> str | None:
    """What goes wrong with a quantile, or None inside the working range (and where K = N, which has no routing loss).

    >>> out_of_range(0.3, num_experts=2, selected=1)
    'selections are replaced for ever'
    >>> out_of_range(0.5, num_experts=2, selected=1)
    """
    if selected >= num_experts:
        return None
    share = selected / num_experts
    if quantile < LOWEST * share:
        return "selections are replaced for ever"
    if quantile > HIGHEST * share:
        return "the random start freezes"
    return None


def warn_outside(recipe: Recipe) -> None:
    """One UserWarning if a recipe's routing loss leaves the working range in any layer."""
    loss = recipe.model.routing_loss
    if recipe.model.kind != "smoe" or recipe.model.gate.kind == "fixed" or loss is None:
        return
    if isinstance(loss.quantile, str):
        return
    experts = recipe.model.num_experts
    for layer, selected in enumerate(recipe.model.selected):
        published = (
            recipe.task == "heat"
            and recipe.data.noise == 0
            and loss.quantile == PUBLISHED_HEAT_QUANTILE
            and 3 * selected == experts
        )
        what = out_of_range(loss.quantile, experts, selected)
        if what is not None and not published:
            low, high = LOWEST * selected / experts, min(1.0, HIGHEST * selected / experts)
            warnings.warn(
                f"model.routing_loss.quantile={loss.quantile:g} in layer {layer}, which selects {selected} of "
                f"{experts} experts: on data with noise {what} outside {low:.3g} to {high:.3g}; "
                "model.routing_loss.quantile=balanced is always inside",
                UserWarning,
                stacklevel=3,
            )
            return
