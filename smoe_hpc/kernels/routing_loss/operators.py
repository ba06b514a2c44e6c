"""The two halves of the routing loss as operators: torch.compile and CUDA graphs see each as one step.

* ``smoe_hpc::label_and_damp``: from the gradient of a layer's output, which selections were correct, and damping.
* ``smoe_hpc::gate_gradient``: from the counts of correct selections, the gate's gradient and the routing loss.

Between them counts may be exchanged among processes. On a CUDA device with compiled kernels a few fused passes do each half
(:mod:`smoe_hpc.kernels.cuda.routing_loss`); anywhere else, and in float64, the fallback below runs in torch. What the
numbers mean is explained in :mod:`smoe_hpc.kernels.routing_loss.attach`.

Dimensions: B batch, N experts, K selected, F filters per expert, O = K F output channels, H latitude rows, W longitude columns.
Values and labels may be [B, N, H, W], indices and counts [B, K, H, W].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels.cuda import routing_loss as cuda
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.quantile import row_quantiles
from smoe_hpc.kernels.routing_loss.request import Request

_library = torch.library.Library("smoe_hpc", "FRAGMENT")
_library.define(
    "label_and_damp(Tensor grad, Tensor? scale, Tensor? before_weighting, Tensor? error_divisor, int filters, "
    "float? quantile, float tolerance, float? damping_quantile, float damping_tolerance, float damping_factor, "
    "bool each, bool wants_errors) -> (Tensor counts, Tensor damped, Tensor error_sum)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "gate_gradient(Tensor values, Tensor counts, Tensor indices, Tensor? scale, int batch, float share) "
    "-> (Tensor grad, Tensor loss)",
    tags=torch.Tag.pt2_compliant_tag,
)


def label_and_damp(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, request: Request
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct selections, the damped gradient and sums of errors; what is not wanted comes back empty.

    Args:
        grad: [B, K F, H, W], gradient of the layer's output.
        scale: 0-d, |s|; None: 1.
        before_weighting: like ``grad``, multiplied with it for the labels.
        error_divisor: [H, W].
        request: what is wanted.

    Returns:
        Counts [K, H, W] or [B, K, H, W] of float32 (float64 for a gradient of float64), the damped gradient like ``grad``,
        and sums [H, W] over batch and selections.
    """
    counts, damped, error_sum = torch.ops.smoe_hpc.label_and_damp.default(
        grad, scale, before_weighting, error_divisor, *request
    )
    return counts, damped, error_sum


def gate_gradient(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the routing loss to the gate's values, times ``share`` and the scale; and the loss, 0-d.

    Args:
        values: [N, H, W], or [B, N, H, W].
        counts: [K, H, W], correct selections summed over the batch, where neither values nor indices have a batch
            dimension; else [B, K, H, W].
        indices: [K, H, W] or [B, K, H, W].
        scale: 0-d, |s|; None: 1.
        batch: B.
        share: 1 / number of layers that share the gate.

    An empty batch gives zeros.
    """
    grad, loss = torch.ops.smoe_hpc.gate_gradient.default(values, counts, indices, scale, batch, share)
    return grad, loss


def damping_factors(grad: Tensor, scale: Tensor | None, error_divisor: Tensor | None, request: Request) -> Tensor:
    """[B, K F, H, W] like ``grad``, what damping multiplies it with: 1, or the damping factor of the request.

    Arguments are those of :func:`label_and_damp`, whose damped gradient is this times ``grad``.
    """
    errors = _scaled(_errors(grad, request.filters) * _to_error(grad, scale), error_divisor)
    assert request.damping_quantile is not None
    return _damping_factors(errors, row_quantiles(errors.flatten(1), request.damping_quantile), grad.dtype, request)


# -- the fallback, in torch ------------------------------------------------------------------------------------------------


def _accumulates(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _errors(grad: Tensor, filters: int) -> Tensor:
    """[B, K, H, W]: mean over an expert's F filters of |grad|, in float32 or float64."""
    size = grad.abs() if grad.dtype == torch.float64 else grad.float().abs()
    return size if filters == 1 else size.unflatten(1, (-1, filters)).mean(2)


def _to_error(grad: Tensor, scale: Tensor | None) -> Tensor | float:
    """What turns sizes of a gradient into errors."""
    return grad.numel() / 2 if scale is None else (grad.numel() / 2) / scale


def _damping_factors(errors: Tensor, threshold: Tensor, dtype: torch.dtype, request: Request) -> Tensor:
    # Arithmetic on 0 and 1 in place of a torch.where, which takes a CPU ten times as long; factors, so that what is
    # not finite survives a factor of 0.
    wrong = errors.clone().gt_((threshold + request.damping_tolerance)[:, None, None, None]).to(dtype)
    factors = torch.add(1.0 - wrong, wrong, alpha=request.damping_factor)
    return factors if request.filters == 1 else factors.repeat_interleave(request.filters, 1)


def _scaled(errors: Tensor, divisor: Tensor | None) -> Tensor:
    return errors if divisor is None else errors / divisor.to(errors.dtype)


def _label_and_damp(
    grad_BOHW: Tensor,
    scale: Tensor | None,
    before_weighting_BOHW: Tensor | None,
    error_divisor_HW: Tensor | None,
    *asked: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    request = Request(*asked)
    filters, quantile, tolerance, damping_quantile, _, _, each, wants_errors = request
    counts = damped_BOHW = error_sum_HW = threshold_B = None
    own_errors_BKHW = _errors(grad_BOHW, filters) * _to_error(grad_BOHW, scale)
    if wants_errors:
        error_sum_HW = own_errors_BKHW.sum((0, 1))
    if quantile is not None:
        errors_BKHW = own_errors_BKHW
        if before_weighting_BOHW is not None:
            errors_BKHW = _errors(grad_BOHW * before_weighting_BOHW, filters) * _to_error(grad_BOHW, scale)
        errors_BKHW = _scaled(errors_BKHW, error_divisor_HW)
        threshold_B = row_quantiles(errors_BKHW.flatten(1), quantile)
        correct_BKHW = errors_BKHW.clone().le_((threshold_B + tolerance)[:, None, None, None])
        counts = correct_BKHW if each else correct_BKHW.sum(0)
    if damping_quantile is not None:
        errors_BKHW = _scaled(own_errors_BKHW, error_divisor_HW)
        if threshold_B is None or before_weighting_BOHW is not None or damping_quantile != quantile:
            threshold_B = row_quantiles(errors_BKHW.flatten(1), damping_quantile)
        damped_BOHW = grad_BOHW * _damping_factors(errors_BKHW, threshold_B, grad_BOHW.dtype, request)
    return _all_three(grad_BOHW, counts, damped_BOHW, error_sum_HW)


def _all_three(
    grad: Tensor, counts: Tensor | None, damped: Tensor | None, error_sum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as the operator promises: the gradient's channels last if they are in ``grad``; empty in place of None."""
    last = not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)
    nothing = grad.new_empty(0, dtype=_accumulates(grad.dtype))
    if counts is None:
        counts = nothing
    else:
        counts = counts.movedim(-3, -1).contiguous().movedim(-1, -3) if last else counts.contiguous()
    if damped is None:
        damped = grad.new_empty(0)
    else:
        damped = damped.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return counts, damped, grad.new_empty(0, dtype=nothing.dtype) if error_sum is None else error_sum.contiguous()


def gate_gradient_fallback(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    """What :func:`gate_gradient` says, differentiable to values and scale."""
    if batch == 0:  # the mean over no pixels: nothing is learned
        return torch.zeros_like(values, memory_format=torch.contiguous_format), values.new_zeros(())
    experts_dim = values.dim() - 3
    num_experts, selected = values.shape[experts_dim], indices.shape[-3]
    counts, indices = counts.to(values.dtype), indices.to(torch.int64)
    of_each = 1 if values.dim() == 4 else batch
    if counts.dim() == 4:
        indices = indices.expand(batch, -1, -1, -1)
    if counts.dim() > values.dim():  # samples have their own choice, the values are shared: add up their labels
        wrong_HW = (selected - counts.sum(1)).sum(0)
        own_NHW = torch.zeros_like(values)
        wrong_here_NHW = torch.zeros_like(values)
        for counts_KHW, indices_KHW in zip(counts, indices, strict=True):
            own_NHW.scatter_add_(0, indices_KHW, counts_KHW)
            sample_wrong_KHW = (selected - counts_KHW.sum(0, keepdim=True)).expand_as(counts_KHW)
            wrong_here_NHW.scatter_add_(0, indices_KHW, sample_wrong_KHW)
        labels_NHW = own_NHW + (wrong_HW - wrong_here_NHW) / (num_experts - selected)
    else:
        wrong_1HW = (selected * of_each - counts.sum(experts_dim, keepdim=True)) / (num_experts - selected)
        labels_NHW = wrong_1HW.expand_as(values).scatter(experts_dim, indices, counts)
    entries = batch * num_experts * values.shape[-2] * values.shape[-1]
    grad_NHW = (of_each * values.sigmoid() - labels_NHW) / entries
    loss = (of_each * F.softplus(values) - labels_NHW * values).sum() / entries
    return (grad_NHW * (share if scale is None else scale.to(values.dtype) * share)).contiguous(), loss


# -- on a CUDA device ------------------------------------------------------------------------------------------------------


def _label_and_damp_cuda(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, *asked: Any
) -> tuple[Tensor, Tensor, Tensor]:
    same = before_weighting is None or before_weighting.dtype == grad.dtype
    if same and grad.numel() and cuda.serves(grad):
        try:
            return _all_three(grad, *cuda.label_and_damp(grad, scale, before_weighting, error_divisor, Request(*asked)))
        except Unsupported:
            pass
    return _label_and_damp(grad, scale, before_weighting, error_divisor, *asked)


def _gate_gradient_cuda(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    fits = values.dim() == 3 or values.shape[0] == batch
    if batch and fits and values.dtype == torch.float32 and values.numel() and cuda.serves(values):
        try:
            return cuda.gate_gradient(values, counts, indices, scale, batch, share)
        except Unsupported:
            pass
    return gate_gradient_fallback(values, counts, indices, scale, batch, share)


# -- shapes alone ----------------------------------------------------------------------------------------------------------


def _label_and_damp_fake(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, *asked: Any
) -> tuple[Tensor, Tensor, Tensor]:
    request = Request(*asked)
    batch, channels, height, width = grad.shape
    shape = (*([batch] if request.each else []), channels // request.filters, height, width)
    dtype = _accumulates(grad.dtype)
    return _all_three(
        grad,
        None if request.quantile is None else grad.new_empty(shape, dtype=dtype),
        None if request.damping_quantile is None else torch.empty_like(grad),
        grad.new_empty((height, width), dtype=dtype) if request.wants_errors else None,
    )


def _gate_gradient_fake(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(())


for _name, _fallback, _cuda_form, _fake in (
    ("label_and_damp", _label_and_damp, _label_and_damp_cuda, _label_and_damp_fake),
    ("gate_gradient", gate_gradient_fallback, _gate_gradient_cuda, _gate_gradient_fake),
):
    _library.impl(_name, _fallback, "CompositeExplicitAutograd")
    _library.impl(_name, _cuda_form, "CUDA")
    torch.library.register_fake(f"smoe_hpc::{_name}", _fake, lib=_library)
