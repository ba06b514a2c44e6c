"""The two halves of the routing signal as operators: torch.compile and CUDA graphs see each as one step.

* ``smoe_hpc::signal_counts``: from the gradient of a layer's output, which selections were correct, and damping.
* ``smoe_hpc::gate_gradient``: from the counts of correct selections, the gate's gradient and the routing loss.

Between them counts may be exchanged among processes. On a CUDA device with compiled kernels a few fused passes do each half
(:mod:`smoe_hpc.kernels.cuda.signal`); anywhere else, and in float64, the forms below, written in torch, serve. What the
numbers mean stands in :mod:`smoe_hpc.kernels.signal`.

Dimensions: B batch, N experts, K selected, F filters per expert, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels.cuda import signal as cuda
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.quantile import row_quantiles
from smoe_hpc.kernels.signal_request import Request

_library = torch.library.Library("smoe_hpc", "FRAGMENT")
_library.define(
    "signal_counts(Tensor grad, Tensor? scale, Tensor? before_weighting, Tensor? error_divisor, int filters, "
    "float? quantile, float tolerance, float? damping_quantile, float damping_tolerance, float damping_factor, "
    "bool each, bool wants_errors) -> (Tensor counts, Tensor damped, Tensor error_sum)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "gate_gradient(Tensor values, Tensor counts, Tensor indices, Tensor? scale, int batch, float share) "
    "-> (Tensor grad, Tensor loss)",
    tags=torch.Tag.pt2_compliant_tag,
)


def signal_counts(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, request: Request
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct selections, the damped gradient and sums of errors; what is not wanted comes back empty.

    Args:
        grad: [B, K F, H, W], gradient of the layer's output.
        scale: 0-d, s; None: 1.
        before_weighting: like ``grad``, multiplied with it for the labels.
        error_divisor: [H, W].
        request: what is wanted.

    Returns:
        Counts [K, H, W] or [B, K, H, W] of float32 (float64 for a gradient of float64), the damped gradient like ``grad``,
        and sums [H, W] over batch and selections.
    """
    counts, damped, error_sum = torch.ops.smoe_hpc.signal_counts.default(
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
        scale: 0-d, s; None: 1.
        batch: B.
        share: 1 / number of layers that share the gate.

    An empty batch gives zeros.
    """
    grad, loss = torch.ops.smoe_hpc.gate_gradient.default(values, counts, indices, scale, batch, share)
    return grad, loss


# -- written in torch ------------------------------------------------------------------------------------------------------


def _accumulates(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _errors(grad: Tensor, filters: int) -> Tensor:
    """[B, K, H, W]: mean over an expert's F filters of |grad|, in float32 or float64."""
    size = grad.abs() if grad.dtype == torch.float64 else grad.float().abs()
    return size if filters == 1 else size.unflatten(1, (-1, filters)).mean(2)


def _scaled(errors: Tensor, divisor: Tensor | None) -> Tensor:
    return errors if divisor is None else errors / divisor.to(errors.dtype)


def _signal_counts(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, *asked: Any
) -> tuple[Tensor, Tensor, Tensor]:
    filters, quantile, tolerance, damping_quantile, damping_tolerance, damping_factor, each, wants_errors = Request(*asked)
    counts = damped = error_sum = threshold = None
    own_errors = _errors(grad, filters) * (grad.numel() / 2 if scale is None else (grad.numel() / 2) / scale)
    if wants_errors:
        error_sum = own_errors.sum((0, 1))
    if quantile is not None:
        errors = own_errors
        if before_weighting is not None:
            to_error = grad.numel() / 2 if scale is None else (grad.numel() / 2) / scale
            errors = _errors(grad * before_weighting, filters) * to_error
        errors = _scaled(errors, error_divisor)
        threshold = row_quantiles(errors.flatten(1), quantile)
        correct = errors.clone().le_((threshold + tolerance)[:, None, None, None])
        counts = correct if each else correct.sum(0)
    if damping_quantile is not None:
        errors = _scaled(own_errors, error_divisor)
        if threshold is None or before_weighting is not None or damping_quantile != quantile:
            threshold = row_quantiles(errors.flatten(1), damping_quantile)
        # Arithmetic on 0 and 1 in place of a torch.where, which takes a CPU ten times as long; a product, so that what is
        # not finite survives a factor of 0.
        wrong = errors.clone().gt_((threshold + damping_tolerance)[:, None, None, None]).to(grad.dtype)
        factor = torch.add(1.0 - wrong, wrong, alpha=damping_factor)
        damped = grad * (factor if filters == 1 else factor.repeat_interleave(filters, 1))
    return _all_three(grad, counts, damped, error_sum)


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


def _gate_gradient(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    if batch == 0:  # the mean over no pixels: nothing is learned
        return torch.zeros_like(values, memory_format=torch.contiguous_format), values.new_zeros(())
    experts_dim = values.dim() - 3
    num_experts, selected = values.shape[experts_dim], indices.shape[-3]
    counts, indices = counts.to(values.dtype), indices.to(torch.int64)
    of_each = 1 if values.dim() == 4 else batch
    if counts.dim() == 4:
        indices = indices.expand(batch, -1, -1, -1)
    if counts.dim() > values.dim():  # samples have their own choice, the values are shared: add up their labels
        wrong = (selected - counts.sum(1)).sum(0)
        own = torch.zeros_like(values)
        wrong_here = torch.zeros_like(values)
        for sample_counts, sample_indices in zip(counts, indices, strict=True):
            own.scatter_add_(0, sample_indices, sample_counts)
            sample_wrong = (selected - sample_counts.sum(0, keepdim=True)).expand_as(sample_counts)
            wrong_here.scatter_add_(0, sample_indices, sample_wrong)
        labels = own + (wrong - wrong_here) / (num_experts - selected)
    else:
        wrong = (selected * of_each - counts.sum(experts_dim, keepdim=True)) / (num_experts - selected)
        labels = wrong.expand_as(values).scatter(experts_dim, indices, counts)
    pixels = batch * num_experts * values.shape[-2] * values.shape[-1]
    grad = (of_each * values.sigmoid() - labels) / pixels
    loss = (of_each * F.softplus(values) - labels * values).sum() / pixels
    return (grad * (share if scale is None else scale.to(values.dtype) * share)).contiguous(), loss


# -- on a CUDA device ------------------------------------------------------------------------------------------------------


def _signal_counts_cuda(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, *asked: Any
) -> tuple[Tensor, Tensor, Tensor]:
    same = before_weighting is None or before_weighting.dtype == grad.dtype
    if same and grad.numel() and cuda.serves(grad):
        try:
            return _all_three(grad, *cuda.judge(grad, scale, before_weighting, error_divisor, Request(*asked)))
        except Unsupported:
            pass
    return _signal_counts(grad, scale, before_weighting, error_divisor, *asked)


def _gate_gradient_cuda(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    fits = values.dim() == 3 or values.shape[0] == batch
    if batch and fits and values.dtype == torch.float32 and values.numel() and cuda.serves(values):
        try:
            return cuda.gate_gradient(values, counts, indices, scale, batch, share)
        except Unsupported:
            pass
    return _gate_gradient(values, counts, indices, scale, batch, share)


# -- shapes alone ----------------------------------------------------------------------------------------------------------


def _signal_counts_fake(
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


for _name, _torch_form, _cuda_form, _fake in (
    ("signal_counts", _signal_counts, _signal_counts_cuda, _signal_counts_fake),
    ("gate_gradient", _gate_gradient, _gate_gradient_cuda, _gate_gradient_fake),
):
    _library.impl(_name, _torch_form, "CompositeExplicitAutograd")
    _library.impl(_name, _cuda_form, "CUDA")
    torch.library.register_fake(f"smoe_hpc::{_name}", _fake, lib=_library)
