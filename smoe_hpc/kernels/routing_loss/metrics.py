"""What the backward passes of a layer say about its routing.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_hpc.errors import SmoeError


@dataclass(eq=False)
class RoutingLossMetrics:
    """What the last backward found: filled in place, detached, on the layer's device, never read back by it.

    Args:
        routing_loss: 0-d, the routing loss RC of this layer, of the last backward.
        error_sum: [H, W], sum over batch and selections of the unscaled error since :meth:`take_errors`.
        error_count: how many errors of a pixel went into it; 0-d, on the device.
        wants_errors: whether ``error_sum`` is to be kept.
        with_scale, without_scale: numbers of the last backward passes of autograd in which the scale of the loss reached a
            scalar of this layer, and in which the gradient of an output came without it.
    """

    routing_loss: Tensor | None = None
    error_sum: Tensor | None = None
    error_count: Tensor | None = None
    wants_errors: bool = False
    with_scale: int = -1
    without_scale: int = -1

    def note_scale(self, number: int) -> None:
        """The scale of the loss came to the scalars that were read, in backward pass ``number``.

        Raises:
            SmoeError: an output of this layer, in the same loss, has none.
        """
        self.with_scale = number
        self._check_scale()

    def note_no_scale(self, number: int) -> None:
        """The gradient of an output came without the scale of the loss; raises as :meth:`note_scale`."""
        self.without_scale = number
        self._check_scale()

    def _check_scale(self) -> None:
        if self.with_scale == self.without_scale:
            raise SmoeError(
                "routing_loss(model) was read before all forwards of this loss had run, so the later ones lost its scale; "
                "read it after the last forward, or once after each forward, and add what was read to the loss"
            )

    def add_errors(self, total: Tensor, count: int) -> None:
        """Add a sum [H, W] of ``count`` errors at each pixel; nothing where it is not finite, as after an overflow that a
        gradient scaler finds, or with a loss times 0.
        """
        usable = total.isfinite().all()  # on the device, without waiting for it
        total = torch.where(usable, total, 0.0)
        counted = usable.to(total.dtype) * count
        self.error_sum = total if self.error_sum is None else self.error_sum + total
        self.error_count = counted if self.error_count is None else self.error_count + counted

    def take_errors(self) -> tuple[Tensor | None, Tensor | None]:
        """The sum and count so far, which start again from nothing."""
        taken = self.error_sum, self.error_count
        self.error_sum, self.error_count = None, None
        return taken
