"""A recipe whose routing loss leaves its working range (`working_range.py`) is warned of, once.

Dimensions: N experts, K selected experts.
"""

from __future__ import annotations

import warnings

from smoe_hpc.config.recipe import Recipe
from smoe_hpc.config.working_range import HIGHEST, LOWEST, out_of_range

PUBLISHED_HEAT_QUANTILE = 0.3
"""Works at K/N = 1/3 although below it, because noiseless targets let the absolute tolerance settle the routing."""


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
