"""The expert convolution and its gradients on a GPU: layouts, and which kernel runs.

The kernels take maps channels last, channels padded to a multiple of 8, and weights packed [N F, k k, C]; this module turns
a user's tensors into that and the results back. Hopper's own kernels come first, the portable ones take what those decline,
and torch what neither does (float64, more than 65535 experts).

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels import torch_forms
from smoe_hpc.kernels.cuda import hopper, portable
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.cuda.packing import pack_weight, padded_channels, unpack_gradient
from smoe_hpc.kernels.padding import pad
from smoe_hpc.kernels.plan import Plan, make_plan, to_index
from smoe_hpc.kernels.planning import geometry_for, geometry_of, suits_tiles


def prepare(
    x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor | None]:
    """What forward and backward share: the plan that was given, or one made now, and the packed weights; where the dense form
    is the faster one, neither.
    """
    if not suits_tiles(x.dtype, x.shape[0], weight.shape, indices.shape):
        return (), None
    if not plan:
        plan = _plan(x.shape[0], weight.shape, indices, padding, ()).tensors()
    return plan, pack_weight(weight, x.dtype)


def forward(
    x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor], packed: Tensor | None = None
) -> Tensor:
    """[B, K F, H, W], channels last; see :func:`smoe_hpc.kernels.expert_conv2d`. ``packed``: as :func:`prepare` gives it."""
    if not suits_tiles(x.dtype, x.shape[0], weight.shape, indices.shape):
        return torch_forms.forward(x, weight, indices, padding)
    prepared = _plan(x.shape[0], weight.shape, indices, padding, plan)
    rows = _rows(x, weight.shape[-1], padding)
    weights = pack_weight(weight, x.dtype) if packed is None else packed
    return _first_that_serves(
        lambda: hopper.forward(rows, weights, prepared), lambda: portable.forward(rows, weights, prepared)
    ).permute(0, 3, 1, 2)


def input_grad(
    g: Tensor,
    weight: Tensor,
    indices: Tensor,
    padding: str,
    plan: Sequence[Tensor],
    x_shape: torch.Size,
    packed: Tensor | None = None,
) -> Tensor:
    """[B, C, H, W], channels last, from g [B, K F, H, W]."""
    if not suits_tiles(g.dtype, x_shape[0], weight.shape, indices.shape):
        dx, _ = torch_forms.backward(g, g.new_empty(x_shape), weight, indices, padding, True, False)
        assert dx is not None
        return dx
    prepared = _plan(x_shape[0], weight.shape, indices, padding, plan)
    g_rows, weights = _nhwc(g), pack_weight(weight, g.dtype) if packed is None else packed
    rows = _first_that_serves(
        lambda: hopper.input_grad(g_rows, weights, prepared),
        lambda: portable.input_grad(g_rows, weights, prepared),
    )
    dx = rows[..., : weight.shape[2]].permute(0, 3, 1, 2)
    return torch_forms.fold(dx, weight.shape[-1], padding) if padding == "sphere" else dx


def weight_grad(
    g: Tensor,
    x: Tensor,
    indices: Tensor,
    padding: str,
    plan: Sequence[Tensor],
    weight_shape: torch.Size,
    weight_dtype: torch.dtype,
) -> Tensor:
    """[N, F, C, k, k] of ``weight_dtype``, from g [B, K F, H, W] and x [B, C, H, W].

    Sums are added in one order where torch is asked for deterministic algorithms.
    """
    if not suits_tiles(x.dtype, x.shape[0], weight_shape, indices.shape):
        zeros = x.new_zeros(weight_shape, dtype=weight_dtype)
        _, dw = torch_forms.backward(g, x, zeros, indices, padding, False, True)
        assert dw is not None
        return dw
    prepared = _plan(x.shape[0], weight_shape, indices, padding, plan)
    rows, g_rows = _rows(x, weight_shape[-1], padding), _nhwc(g)
    experts, filters, channels, size, _ = weight_shape
    packed_shape = torch.Size((experts * filters, size * size, padded_channels(channels)))
    ordered = torch.are_deterministic_algorithms_enabled()
    packed = _first_that_serves(
        lambda: hopper.weight_grad(rows, g_rows, prepared, filters, deterministic=ordered),
        lambda: portable.weight_grad(rows, g_rows, packed_shape, prepared, ordered=ordered),
    )
    return unpack_gradient(packed, weight_shape, weight_dtype)


def _first_that_serves(*forms: Callable[[], Tensor]) -> Tensor:
    *early, last = forms
    for form in early:
        try:
            return form()
        except Unsupported:
            continue
    return last()


def _nhwc(x: Tensor) -> Tensor:
    """[B, H, W, C], contiguous, of a map in any layout; a copy unless it is channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _rows(x: Tensor, kernel_size: int, padding: str) -> Tensor:
    """The input as the kernels read it: [B, H, W, C rounded up to 8], with the rows and columns around it for "sphere"."""
    if padding == "sphere":
        x = pad(x, kernel_size, padding)
    rows = _nhwc(x)
    missing = padded_channels(rows.shape[-1]) - rows.shape[-1]
    return F.pad(rows, (0, missing)) if missing else rows


def _plan(batch: int, weight_shape: torch.Size, indices: Tensor, padding: str, tensors: Sequence[Tensor]) -> Plan:
    """The plan that was given, or one made now."""
    experts, size = weight_shape[0], weight_shape[-1]
    selected, height, width = indices.shape[-3:]
    per_sample = indices.dim() == 4 and indices.shape[0] > 1
    sizes = (experts, selected, (height, width), batch, size, padding, per_sample)
    if tensors:
        return Plan.from_tensors(geometry_of(tensors, *sizes), list(tensors))
    return make_plan(to_index(indices), geometry_for(*sizes))
