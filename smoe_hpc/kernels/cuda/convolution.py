"""The expert convolution and its gradients on a GPU: layouts, and which kernel runs.

The kernels take maps channels last, channels padded to a multiple of 8, and weights packed [N F, k k, C]; this module turns
a user's tensors into that and the results back. Hopper's own kernels are tried first, then the portable ones. If neither
supports the sizes, ``Unsupported`` is raised and the fallback in torch is used.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels import fallback
from smoe_hpc.kernels.cuda import hopper, portable
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.cuda.packing import pack_weight, padded_channels, unpack_gradient
from smoe_hpc.kernels.padding import pad
from smoe_hpc.kernels.planning.geometry import geometry_for
from smoe_hpc.kernels.planning.making import geometry_of, make_plan, to_index
from smoe_hpc.kernels.planning.plan import Plan


def prepare(
    x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor]:
    """What forward and backward share: the plan that was given, or one made now, and the packed weights.

    Raises:
        Unsupported: sizes that the kernels do not have.
    """
    packed = pack_weight(weight, x.dtype)
    return plan or _plan(x.shape[0], weight.shape, indices, padding, ()).tensors(), packed


def forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor], packed: Tensor) -> Tensor:
    """[B, K F, H, W], channels last; see :func:`smoe_hpc.kernels.expert_conv2d`.

    Args beyond those: ``plan`` and ``packed`` as :func:`prepare` gives them.

    Raises:
        Unsupported: sizes that the kernels do not have.
    """
    prepared = _plan(x.shape[0], weight.shape, indices, padding, plan)
    rows = _rows(x, weight.shape[-1], padding)
    return _first_that_serves(
        lambda: hopper.forward(rows, packed, prepared), lambda: portable.forward(rows, packed, prepared)
    ).permute(0, 3, 1, 2)


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    padding: str,
    plan: Sequence[Tensor],
    packed: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients [B, C, H, W], channels last, and [N, F, C, k, k], where they are needed, from g [B, K F, H, W].

    The weights' comes first: what it works with is given back before the larger one of the input is there.

    Raises:
        Unsupported: sizes that the kernels do not have.
    """
    prepared = _plan(x.shape[0], weight.shape, indices, padding, plan)
    g_rows = _nhwc(g)
    dw = _weight_grad(g_rows, x, weight, padding, prepared) if needs_weight else None
    return _input_grad(g_rows, weight, padding, prepared, packed) if needs_x else None, dw


def _input_grad(g_rows: Tensor, weight: Tensor, padding: str, plan: Plan, packed: Tensor) -> Tensor:
    rows = _first_that_serves(
        lambda: hopper.input_grad(g_rows, packed, plan), lambda: portable.input_grad(g_rows, packed, plan)
    )
    dx = rows[..., : weight.shape[2]].permute(0, 3, 1, 2)
    return fallback.fold(dx, weight.shape[-1], padding) if padding == "sphere" else dx


def _weight_grad(g_rows: Tensor, x: Tensor, weight: Tensor, padding: str, plan: Plan) -> Tensor:
    """Sums are added in one order where torch is asked for deterministic algorithms."""
    experts, filters, channels, size, _ = weight.shape
    rows = _rows(x, size, padding)
    packed_shape = torch.Size((experts * filters, size * size, padded_channels(channels)))
    ordered = torch.are_deterministic_algorithms_enabled()
    packed = _first_that_serves(
        lambda: hopper.weight_grad(rows, g_rows, plan, filters, deterministic=ordered),
        lambda: portable.weight_grad(rows, g_rows, packed_shape, plan, ordered=ordered),
    )
    return unpack_gradient(packed, weight.shape, weight.dtype)


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
