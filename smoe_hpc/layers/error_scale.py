"""What a layer's errors are divided by before they are compared: a weight of the loss, or a running mean of themselves.

See :class:`smoe_hpc.layers.RoutingLoss`, ``error_scale``. Both are kept in float32 whatever the layer is cast to.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.convolutions.grid_layer import GridLayer
from smoe_hpc.layers.moving import Move, wide, wide_default, widen

_ERROR_MEMORY = 0.99  # share of the running mean of the error that a step keeps
_FLOAT32 = ("loss_weight", "running_error")


class ErrorScaledLayer(GridLayer):
    """A layer that knows what to divide its errors by.

    Buffers: ``loss_weight`` [H, W], not in the state dict; and with "running_mean" ``running_error`` [H, W] and
    ``running_steps``, how many steps it is a mean of.
    """

    weight: nn.Parameter
    loss_weight: Tensor | None
    running_error: Tensor | None
    running_steps: Tensor | None

    def scale_errors(self, kind: str) -> None:
        """Make the buffers for "none", "loss_weight" or "running_mean"."""
        self._scale_needs = kind
        tracks = kind == "running_mean"
        self.register_buffer("loss_weight", None, persistent=False)
        self.register_buffer("running_error", torch.zeros(self.grid, dtype=wide_default()) if tracks else None)
        self.register_buffer("running_steps", torch.zeros((), dtype=torch.int64) if tracks else None)

    def forget_errors(self) -> None:
        """Restart the running mean."""
        for tracked in (self.running_error, self.running_steps):
            if tracked is not None:
                nn.init.zeros_(tracked)

    def set_loss_weight(self, weight: Tensor) -> None:
        """Tell the layer the weight [H, W] that the task's loss gives each pixel, for ``error_scale="loss_weight"``.

        Raises:
            ConfigError: another grid, or a weight that is not positive.
        """
        if tuple(weight.shape) != self.grid or not (weight.is_meta or bool((weight > 0).all())):
            raise ConfigError(f"loss weight {tuple(weight.shape)} must be positive on the layer's grid {self.grid}")
        with torch.inference_mode(False):
            self.loss_weight = weight.detach().to(self.weight.device, torch.float32, copy=True)

    def error_divisor(self) -> Tensor | None:
        """What errors at each pixel are divided by [H, W]; None: nothing.

        Raises:
            ConfigError: ``error_scale="loss_weight"`` and no weight is known.
        """
        if self._scale_needs == "loss_weight":
            if self.loss_weight is None:
                raise ConfigError("error_scale='loss_weight' but the layer knows no weight; call set_loss_weight first")
            return self.loss_weight
        if self._scale_needs == "running_mean":
            assert self.running_error is not None
            assert self.running_steps is not None
            tiny = torch.finfo(torch.float32).tiny
            mean = self.running_error.clamp_min(tiny)
            return torch.where(self.running_steps > 0, mean, torch.ones_like(mean))
        return None

    @torch.no_grad()
    def update_running_error(self, total: Tensor, count: int | Tensor) -> None:
        """Take errors [H, W] of a step, summed over ``count`` selections at each pixel (0-d where it lies on the device),
        into the running mean; nothing if none.
        """
        assert self.running_error is not None
        assert self.running_steps is not None
        # torch.full and not torch.tensor, which would wait for the device
        counted = count if isinstance(count, Tensor) else torch.full((), count, device=self.running_error.device)
        any_here = counted > 0
        mean = total.to(self.running_error) / counted.clamp(min=1).to(self.running_error)
        # An average of all steps at first, of about the last hundred later on.
        self.running_steps += any_here.long()
        keep = torch.clamp(1.0 - 1.0 / self.running_steps.clamp(min=1).to(mean.dtype), max=_ERROR_MEMORY)
        self.running_error.lerp_(mean, torch.where(any_here, 1.0 - keep, 0.0))

    def _apply(self, fn: Move, recurse: bool = True) -> GridLayer:
        before = {name: self._buffers[name] for name in _FLOAT32}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                self._buffers[name] = wide(old, new)
        weight, moved = before["loss_weight"], self.loss_weight
        if weight is not None and moved is not None and not moved.is_meta:
            # Moved by itself, for to_empty would leave any numbers; none is known where it was on the meta device.
            self.loss_weight = None if weight.is_meta else weight.to(moved.device, moved.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        widen(state_dict, [prefix + name for name in _FLOAT32])
        super()._load_from_state_dict(state_dict, prefix, *args)
