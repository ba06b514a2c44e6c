"""Where the routing loss works: the one place that holds these numbers.

With noise in the target the share of selections called correct equals the quantile q by construction, and a selection
outranks the unselected experts only while its share exceeds K/N. A lower q re-routes for ever; a much higher one
freezes the random start. Source of the range: the tables of docs/noisy_heat.md, pixels on the right expert over
q and N/K.

Dimensions: N experts, K selected experts.
"""

from __future__ import annotations

LOWEST = 1.0
"""Smallest working quantile, as a multiple of K/N."""

HIGHEST = 1.35
"""Largest working quantile, as a multiple of K/N."""

_BALANCE = 1.1  # a little above K/N finds the regions of the noisy heat experiment


def balanced_quantile(num_experts: int, selected: int) -> float:
    """The quantile a little above K/N, at which a routing loss can both settle and move.

    >>> balanced_quantile(num_experts=2, selected=1)
    0.55
    """
    return min(_BALANCE * selected / num_experts, 0.5 * (1.0 + selected / num_experts))


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
