"""Which layers use a gate together: counted where it is used, in the forwards since the gate's last backward.

A gate that layers share gets the mean of their gradients. Neither the layers that were made with it nor those of the model at
hand say how many that are: layers may be copied, taken out, dropped, or not run in a step.
"""

from __future__ import annotations

import weakref

from smoe_hpc.kernels import PendingForward, RoutingLossMetrics


class Together:
    """Layers whose forwards belong together, known by their metrics; each with its forwards."""

    def __init__(self) -> None:
        self.forwards: dict[RoutingLossMetrics, list[weakref.ref[PendingForward]]] = {}
        self._counted: int | None = None

    @property
    def closed(self) -> bool:
        """Whether a backward has begun: the next forward belongs to others."""
        return self._counted is not None

    def add(self, layer: RoutingLossMetrics, forward: PendingForward) -> None:
        """Note a forward of a layer."""
        alive = [known for known in self.forwards.get(layer, []) if known() is not None]
        self.forwards[layer] = [*alive, weakref.ref(forward)]

    def count(self) -> int:
        """Layers of which a forward is still there: one whose output was dropped learns nothing."""
        if self._counted is not None:
            return self._counted
        return max(sum(any(one() is not None for one in forwards) for forwards in self.forwards.values()), 1)

    def share(self) -> float:
        """1 / number of layers, which holds from now on; asked in backward."""
        self._counted = self.count()
        return 1.0 / self._counted


class Sharing:
    """The layers that use one gate now. A copy (or a pickle) starts afresh."""

    def __init__(self) -> None:
        self._now = Together()

    def join(self, layer: RoutingLossMetrics, forward: PendingForward) -> Together:
        """Note a forward of a layer; returns those it belongs to."""
        if self._now.closed:
            self._now = Together()
        self._now.add(layer, forward)
        return self._now

    def __reduce__(self) -> tuple[type[Sharing], tuple[()]]:
        return Sharing, ()
