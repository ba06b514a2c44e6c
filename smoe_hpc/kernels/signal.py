"""The routing classification loss and the damping of wrong experts, inside the layer's own backward.

Dimensions: B batch, N experts, K selected, F filters per expert, H latitude rows, W longitude columns, P = H W pixels.

Forward, :func:`route_signal` is the identity, plus a scalar of value zero. A caller who adds the scalar to the task's loss
does not change the loss, but the gradient ``s`` that comes back to the scalar is the factor by which the caller scaled it
(accumulation, loss scale): the exact scale of the routing loss. Without it, s = 1.

Backward, with g = dL/dy the gradient at the layer's output (paper, section 3; sizes as the published code has them):

    err[b,k,p]   = mean over F of |g| numel(g) / 2 / s          (weighted: |g times the output before weighting|)
    t_b          = quantile of err[b] over all K, H, W
    correct      = err <= t_b + tolerance
    label[b,e,p] = 1 selected and correct, 0 selected and wrong, else (wrong at p) / (N - K)
    RC           = mean over B, N, P of binary cross-entropy with logits between the gate's values and the labels

The labels enter only through their sum over the batch, so counts [K, H, W] carry everything, and

    dRC/dvalue[e,p] = (B sigmoid(value) - sum_b label) / (B N P)

needs nothing of size B x N x P unless the gate's own values have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels.quantile import row_quantiles


@dataclass(frozen=True)
class SignalRules:
    """What backward does with the gradient of a layer's output.

    Args:
        quantile: share of a sample's selections that are called correct, for the labels; None: no routing loss.
        tolerance: added to that quantile of the error.
        damping_quantile, damping_tolerance: the same for damping; ``damping_quantile`` None: no damping.
        damping_factor: what the gradient of a damped selection is multiplied with.
        gate_share: 1 / number of layers that share the gate, whose gradient is the mean of theirs.
    """

    quantile: float | None
    tolerance: float = 1e-5
    damping_quantile: float | None = None
    damping_tolerance: float = 1e-3
    damping_factor: float = 0.0
    gate_share: float = 1.0


@dataclass
class SignalMetrics:
    """What backward saw last: filled in place, detached, on the layer's device, never read back by it.

    Args:
        routing_loss: 0-d, the routing loss RC of this layer, of the last backward.
        error_sum: [H, W], sum over batch and selections of the unscaled error since :meth:`take_errors`.
        error_count: how many errors of a pixel went into it.
        wants_errors: whether ``error_sum`` is to be kept.
        awaiting: forward passes whose backward has not come yet.
    """

    routing_loss: Tensor | None = None
    error_sum: Tensor | None = None
    error_count: int = 0
    wants_errors: bool = False
    awaiting: int = 0

    def add_errors(self, errors: Tensor) -> None:
        """Add errors [B, K, H, W]."""
        total = errors.sum((0, 1))
        self.error_sum = total if self.error_sum is None else self.error_sum + total
        self.error_count += errors.shape[0] * errors.shape[1]

    def take_errors(self) -> tuple[Tensor | None, int]:
        """The sum and count so far, which start again from nothing."""
        taken = self.error_sum, self.error_count
        self.error_sum, self.error_count = None, 0
        return taken


Collect = Callable[[Tensor, Tensor, int], "tuple[Tensor, Tensor, int]"]


def _everything(counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    return counts, indices, batch


def route_signal(
    y: Tensor,
    values: Tensor | None,
    indices: Tensor,
    rules: SignalRules,
    *,
    filters: int = 1,
    before_weighting: Tensor | None = None,
    error_divisor: Tensor | None = None,
    metrics: SignalMetrics | None = None,
    collect: Collect = _everything,
) -> tuple[Tensor, Tensor]:
    """The identity in forward; the gate's gradient and damping in backward.

    Args:
        y: [B, K F, H, W], the layer's output.
        values: gate values that the routing loss classifies: [N, H, W], [B, N, H, W], or the pixels that this process
            owns of them; None where nothing is to be learned from it.
        indices: [K, H, W] or [B, K, H, W], the selection that made y.
        rules: quantile, tolerances, factor.
        filters: F.
        before_weighting: [B, K F, H, W], detached, where y was multiplied by gate values.
        error_divisor: [H, W], divides the errors before quantiles are taken.
        metrics: filled in backward.
        collect: turns counts of correct selections [K, H, W] (or [B, K, H, W]), the indices and the batch size into
            those of the pixels whose ``values`` are here. The identity unless a gate is spread over processes.

    Returns:
        y and the zero-valued scalar that carries the scale.
    """
    return _RouteSignal.apply(
        y, values, indices, rules, filters, before_weighting, error_divisor, metrics or SignalMetrics(), collect
    )


class _RouteSignal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, values: Tensor | None, indices: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        rules, filters, before_weighting, error_divisor, metrics, collect = rest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, indices, before_weighting, error_divisor)
        ctx.rules, ctx.filters, ctx.metrics, ctx.collect = rules, filters, metrics, collect
        scalar_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        return y.view_as(y), torch.zeros((), dtype=scalar_dtype, device=y.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, scale = grads
        values, indices, before_weighting, error_divisor = ctx.saved_tensors
        ctx.metrics.awaiting = max(ctx.metrics.awaiting - 1, 0)
        nothing = (None,) * 6
        if grad is None:
            return None, None, None, *nothing
        rules, metrics = ctx.rules, ctx.metrics
        if scale is None:
            scale = grad.new_ones((), dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
        to_error = (grad.numel() / 2) / scale
        own_errors = _errors(grad, ctx.filters) * to_error
        if metrics.wants_errors:
            metrics.add_errors(own_errors)
        grad_values = None
        threshold = None
        if rules.quantile is not None and values is not None:
            errors = own_errors
            if before_weighting is not None:
                errors = _errors(grad * before_weighting, ctx.filters) * to_error
            correct, threshold = _correct(errors, error_divisor, rules.quantile, rules.tolerance)
            counts = correct.to(values.dtype)
            counts = counts if indices.dim() == 4 or values.dim() == 4 else counts.sum(0)
            here = ctx.collect(counts, indices, grad.shape[0])
            grad_values, metrics.routing_loss = _classify(values, *here)
            grad_values = grad_values * (scale.to(values.dtype) * rules.gate_share)
        if rules.damping_quantile is not None:
            same = threshold is not None and before_weighting is None and rules.damping_quantile == rules.quantile
            grad = _damp(grad, own_errors, error_divisor, rules, ctx.filters, threshold if same else None)
        return grad, grad_values, None, *nothing


def _errors(grad: Tensor, filters: int) -> Tensor:
    """[B, K, H, W]: mean over an expert's F filters of |grad|, in float32 or float64."""
    size = grad.abs() if grad.dtype == torch.float64 else grad.float().abs()
    return size if filters == 1 else size.unflatten(1, (-1, filters)).mean(2)


def _scaled(errors: Tensor, divisor: Tensor | None) -> Tensor:
    return errors if divisor is None else errors / divisor.to(errors.dtype)


def _correct(errors: Tensor, divisor: Tensor | None, quantile: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which selections are correct, [B, K, H, W] of 0 and 1, and each sample's quantile, [B]."""
    errors = _scaled(errors, divisor)
    threshold = row_quantiles(errors.flatten(1), quantile)
    return errors.clone().le_((threshold + tolerance)[:, None, None, None]), threshold


def _damp(
    grad: Tensor, errors: Tensor, divisor: Tensor | None, rules: SignalRules, filters: int, threshold: Tensor | None
) -> Tensor:
    """The gradient, wrong selections multiplied by the factor: a product, so that inf and NaN survive a factor of 0."""
    assert rules.damping_quantile is not None
    errors = _scaled(errors, divisor)
    if threshold is None:
        threshold = row_quantiles(errors.flatten(1), rules.damping_quantile)
    # Arithmetic on 0 and 1 in place of a torch.where, which takes a CPU ten times as long.
    wrong = errors.clone().gt_((threshold + rules.damping_tolerance)[:, None, None, None]).to(grad.dtype)
    factor = torch.add(1.0 - wrong, wrong, alpha=rules.damping_factor)
    return grad * (factor if filters == 1 else factor.repeat_interleave(filters, 1))


def _classify(values: Tensor, counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Gradient of the routing loss to the gate's values, and its value (0-d).

    ``counts`` are correct selections, summed over the batch where ``values`` have no batch dimension. Where only the
    values have one, each sample has its own labels (B = 1 for every row).
    """
    experts_dim = values.dim() - 3
    num_experts, selected = values.shape[experts_dim], indices.shape[-3]
    if values.dim() == 4:
        indices, of_each = indices.expand(batch, -1, -1, -1), 1
    else:
        of_each = batch
    if counts.dim() > values.dim():  # samples have their own choice, the values are shared: add up their labels
        wrong = (selected - counts.sum(1)).sum(0)
        own = torch.zeros_like(values)
        chosen = torch.zeros_like(values)
        wrong_here = torch.zeros_like(values)
        for sample_counts, sample_indices in zip(counts, indices, strict=True):
            own.scatter_add_(0, sample_indices, sample_counts)
            sample_wrong = (selected - sample_counts.sum(0, keepdim=True)).expand_as(sample_counts)
            wrong_here.scatter_add_(0, sample_indices, sample_wrong)
            chosen.scatter_add_(0, sample_indices, torch.ones_like(sample_counts))
        labels = own + (wrong - wrong_here) / (num_experts - selected)
    else:
        wrong = (selected * of_each - counts.sum(experts_dim, keepdim=True)) / (num_experts - selected)
        labels = wrong.expand_as(values).scatter(experts_dim, indices, counts)
    pixels = batch * num_experts * values.shape[-2] * values.shape[-1]
    grad = (of_each * values.sigmoid() - labels) / pixels
    loss = (of_each * F.softplus(values) - labels * values).sum() / pixels
    return grad, loss
