"""Convolution with the filters of the experts that each pixel selected.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.

Two forms give the same result. *Dense*: all N F filters everywhere, then a gather; cost N / K times the useful work, in
one well-tuned library call. *Per pixel*: each tap of the filter is a map [K F, H, W] of gathered weights, multiplied with
the shifted input; only useful work, but one pass over the output for each of the C k k taps, so for few channels alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.padding import pad

_FEW_TAPS = 64  # C K F up to which the per-pixel form is the faster one on a CPU


def expert_conv2d(x: Tensor, weight: Tensor, indices: Tensor, *, padding: str = "zeros") -> Tensor:
    """Each pixel's selected experts applied to the input around it.

    Args:
        x: [B, C, H, W].
        weight: [N, F, C, k, k], k odd.
        indices: [K, H, W] or [B, K, H, W], int64 in 0..N-1.
        padding: "zeros", "periodic_longitude" or "sphere"; see :func:`smoe_hpc.kernels.padding.pad`.

    Returns:
        [B, K F, H, W]; channel ``k * F + f`` is filter f of the k-th selected expert.

    Raises:
        ConfigError: input and weights of different dtypes outside autocast.
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.float64 not in (x.dtype, weight.dtype):
        x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))  # as F.conv2d would, float64 apart
    elif x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ConfigError(f"input is {x.dtype}, weights are {weight.dtype}; convert one of them, or use torch.autocast")
    padded = pad(x, weight.shape[-1], padding)
    selected = indices.shape[-3]
    few = x.shape[1] * selected * weight.shape[1] <= _FEW_TAPS
    if few and indices.dim() == 3 and x.device.type == "cpu" and weight.shape[0] > selected:
        return _PerPixel.apply(padded, weight, indices)
    return _dense(padded, weight, indices)


def _dense(padded: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    num_experts, filters = weight.shape[:2]
    every = F.conv2d(padded, weight.flatten(0, 1))
    batch, height, width = every.shape[0], *every.shape[2:]
    every = every.view(batch, num_experts, filters, height, width)
    chosen = indices.expand(batch, -1, -1, -1).unsqueeze(2).expand(-1, -1, filters, -1, -1)
    return every.gather(1, chosen).flatten(1, 2)


class _PerPixel(torch.autograd.Function):
    """The per-pixel form; ``padded`` is [B, C, H + k - 1, W + k - 1], ``indices`` [K, H, W]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight, indices)
        taps = _tap_weights(weight, indices)  # [C k k, K F, H, W]
        output: Tensor | None = None
        for tap, shifted in zip(taps, _shifted(padded, weight.shape[-1]), strict=True):
            if output is None:
                output = shifted * tap
            else:
                output.addcmul_(shifted, tap)
        assert output is not None
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads  # [B, K F, H, W]
        padded, weight, indices = ctx.saved_tensors
        size = weight.shape[-1]
        grad_padded = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_padded = torch.zeros_like(padded)
            places = _shifted(grad_padded, size)
            for tap, place in zip(_tap_weights(weight, indices), places, strict=True):
                place += (grad * tap).sum(1, keepdim=True)
        if ctx.needs_input_grad[1]:
            num_experts, filters, channels = weight.shape[:3]
            per_pixel = torch.stack([torch.linalg.vecdot(grad, shifted, dim=0) for shifted in _shifted(padded, size)], dim=-1)
            per_pixel = per_pixel.unflatten(0, (-1, filters)).movedim(1, -2)  # [K, H, W, F, C k k]
            summed = per_pixel.new_zeros(num_experts, filters * channels * size * size)
            summed.index_add_(0, indices.flatten(), per_pixel.reshape(-1, summed.shape[1]))
            grad_weight = summed.view_as(weight)
        return grad_padded, grad_weight, None


def _tap_weights(weight: Tensor, indices: Tensor) -> Tensor:
    """[C k k, K F, H, W]: for every tap of the filters, the weight each pixel's selected experts give it."""
    taps = weight.flatten(2).permute(2, 1, 0)  # [C k k, F, N]
    everywhere = indices.flatten().expand(*taps.shape[:2], -1)
    return taps.gather(2, everywhere).unflatten(2, indices.shape).movedim(1, 2).flatten(1, 2)


def _shifted(padded: Tensor, size: int) -> list[Tensor]:
    """Views [B, 1, H, W] of the input as each tap sees it, in the order of :func:`_tap_weights`."""
    height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
    return [
        padded[:, channel : channel + 1, row : row + height, column : column + width]
        for channel in range(padded.shape[1])
        for row in range(size)
        for column in range(size)
    ]
