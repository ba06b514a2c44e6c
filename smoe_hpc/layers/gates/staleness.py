"""A held choice of experts that belongs to old parameters: noticed in forward, with one warning."""

from __future__ import annotations

import warnings

from torch import nn

from smoe_hpc.compat import version_of

_OTHER = 3  # forwards of a layer since the parameters changed without a renewal
_ANY = 100  # forwards of a layer without a renewal, for optimisers that leave no trace; more than a step's micro-batches


def _state(gate: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes with the parameters and is free to read: versions, which an in-place operation increments, and addresses in
    memory. An in-place write through ``.data``, or by a fused optimiser, shows in neither."""
    return tuple((version_of(p), p.data_ptr() if type(p) is nn.Parameter else 0) for p in gate.parameters())


class Staleness:
    """What forwards have met since :func:`smoe_hpc.layers.end_step` was called for a gate. A copy or pickle starts afresh."""

    def __init__(self) -> None:
        self._noted: tuple[tuple[int, int], ...] | None = None
        self._forwards: dict[object, list[int]] = {}  # of each layer: all, and those since the parameters changed
        self._changed = self._warned = False

    def renewed(self, gate: nn.Module) -> None:
        """The choice was renewed: start from these parameters."""
        self._noted, self._changed = _state(gate), False
        self._forwards.clear()

    def look(self, gate: nn.Module, layer: object) -> None:
        """A forward of a layer that uses the gate; a UserWarning, once, if the choice is not renewed."""
        if self._warned:
            return
        now = _state(gate)
        if self._noted is None:
            self._noted = now
        self._changed |= now != self._noted  # for good: a freed address is soon used again
        counts = self._forwards.setdefault(layer, [0, 0])
        counts[0] += 1
        counts[1] += self._changed
        if counts[1] >= _OTHER or counts[0] >= _ANY:
            self._warned = True
            why = "whose parameters have changed since" if counts[1] else "whose parameters may have changed since"
            warnings.warn(
                f"a layer has trained for {counts[0]} forwards with a choice of experts that was made by a gate {why}, and "
                "evaluates with the present one; call smoe_hpc.layers.end_step(model, step) after each optimiser step "
                "(refresh=... to renew less often), or release_routing(model) to select in each forward",
                stacklevel=4,
            )

    def __reduce__(self) -> tuple[type[Staleness], tuple[()]]:
        return Staleness, ()
