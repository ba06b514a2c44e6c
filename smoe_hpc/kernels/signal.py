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

needs nothing of size B x N x P unless the gate's own values have it. The two halves, up to the counts and from them on, are
operators of :mod:`smoe_hpc.kernels.signal_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.signal_ops import gate_gradient, signal_counts
from smoe_hpc.kernels.signal_request import Request


@dataclass(frozen=True)
class SignalRules:
    """What backward does with the gradient of a layer's output.

    Args:
        quantile: share of a sample's selections that are called correct, for the labels; None: no routing loss.
        tolerance: added to that quantile of the error.
        damping_quantile, damping_tolerance: the same for damping; ``damping_quantile`` None: no damping.
        damping_factor: what the gradient of a damped selection is multiplied with.
        gate_share: 1 / number of layers that share the gate, whose gradient is the mean of theirs.

    Raises:
        ConfigError: a quantile outside 0..1, or a tolerance below 0.
    """

    quantile: float | None
    tolerance: float = 1e-5
    damping_quantile: float | None = None
    damping_tolerance: float = 1e-3
    damping_factor: float = 0.0
    gate_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("quantile", "damping_quantile"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name}={share}: a quantile is a share; give a number from 0 to 1, or None")
        for name in ("tolerance", "damping_tolerance"):
            added = getattr(self, name)
            if not added >= 0.0:
                raise ConfigError(f"{name}={added}: a tolerance widens what counts as correct; give a number of at least 0")


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

    def add_errors(self, total: Tensor, count: int) -> None:
        """Add a sum [H, W] of ``count`` errors at each pixel."""
        self.error_sum = total if self.error_sum is None else self.error_sum + total
        self.error_count += count

    def take_errors(self) -> tuple[Tensor | None, int]:
        """The sum and count so far, which start again from nothing."""
        taken = self.error_sum, self.error_count
        self.error_sum, self.error_count = None, 0
        return taken


Collect = Callable[[Tensor, Tensor, int], "tuple[Tensor, Tensor, int]"]


def _everything(counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    return counts, indices, batch


# Backward writes what it saw into an object of Python's, which a compiled graph cannot: torch.compile breaks off here.
@torch.compiler.disable
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

    Shapes and devices are looked at, and nothing that would wait for a device: indices are those of an expert_conv2d, which
    has looked at their numbers.

    Args:
        y: [B, K F, H, W], the layer's output.
        values: gate values that the routing loss classifies: [N, H, W], [B, N, H, W], or the pixels that this process
            owns of them, N above K; None where nothing is to be learned from it.
        indices: [K, H, W] or [B, K, H, W], the selection that made y.
        rules: quantile, tolerances, factor.
        filters: F.
        before_weighting: [B, K F, H, W], detached, where y was multiplied by gate values.
        error_divisor: [H, W], divides the errors before quantiles are taken.
        metrics: filled in backward.
        collect: turns counts of correct selections [K, H, W] (or [B, K, H, W]), the indices and the batch size into
            those of the pixels whose ``values`` are here. The identity unless a gate is spread over processes.

    Returns:
        y and the zero-valued scalar that carries the scale. What is returned for y lies in the memory of ``y`` and may be
        changed in place; ``y`` itself is then not to be read any more. Autograd refuses the change where an operation
        before has kept y for its backward, and where y is a leaf.

    Raises:
        ConfigError: shapes that do not go together, or tensors on several devices; of what ``collect`` returns, in backward.
    """
    _check(y, values, indices, filters, before_weighting, error_divisor)
    if values is not None and collect is _everything:  # others say in backward which pixels' indices these values go with
        _check_values(values, indices, y.shape[0])
    return _RouteSignal.apply(
        y, values, indices, rules, filters, before_weighting, error_divisor, metrics or SignalMetrics(), collect
    )


# -- what cannot be --------------------------------------------------------------------------------------------------------


def _check(
    y: Tensor,
    values: Tensor | None,
    indices: Tensor,
    filters: int,
    before_weighting: Tensor | None,
    error_divisor: Tensor | None,
) -> None:
    if y.dim() != 4 or indices.dim() not in (3, 4) or filters < 1:
        raise ConfigError(
            f"output {list(y.shape)}, indices {list(indices.shape)}, filters={filters}: give [B, K F, H, W], [K, H, W] or "
            "[B, K, H, W], and at least 1"
        )
    expected = [indices.shape[-3] * filters, *indices.shape[-2:]]
    if list(y.shape[1:]) != expected or (indices.dim() == 4 and indices.shape[0] not in (1, y.shape[0])):
        raise ConfigError(
            f"output {list(y.shape)} is not of indices {list(indices.shape)} with filters={filters}: give the indices that "
            f"made it, [K, H, W] or [B, K, H, W] for [B, K {filters}, H, W]"
        )
    if indices.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"indices are {indices.dtype}; give torch.int64 or torch.int32")
    if before_weighting is not None and before_weighting.shape != y.shape:
        raise ConfigError(f"before_weighting {list(before_weighting.shape)}: give the shape of the output, {list(y.shape)}")
    if error_divisor is not None and error_divisor.shape != y.shape[2:]:
        raise ConfigError(f"error_divisor {list(error_divisor.shape)}: give one number a pixel, {list(y.shape[2:])}")
    others = {"values": values, "indices": indices, "before_weighting": before_weighting, "error_divisor": error_divisor}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != y.device:
            raise ConfigError(f"output is on {y.device}, {name} on {tensor.device}; move them to one device")


def _check_values(values: Tensor, indices: Tensor, batch: int) -> None:
    selected, *grid = indices.shape[-3:]
    experts, *pixels = values.shape[-3:] if values.dim() in (3, 4) else (0,)
    if pixels != grid or experts <= selected or (values.dim() == 4 and values.shape[0] != batch):
        raise ConfigError(
            f"values {list(values.shape)} do not fit indices {list(indices.shape)}: give [N, {grid[0]}, {grid[1]}] or "
            f"[{batch}, N, {grid[0]}, {grid[1]}], N above {selected}, or None to learn nothing"
        )


def _check_collected(counts: Tensor, indices: Tensor, values: Tensor, batch: int) -> None:
    _check_values(values, indices, batch)
    each = [batch] if values.dim() == 4 or indices.dim() == 4 else []
    if list(counts.shape) != [*each, *indices.shape[-3:]] or (indices.dim() == 4 and indices.shape[0] not in (1, batch)):
        raise ConfigError(
            f"collect returned counts {list(counts.shape)}, indices {list(indices.shape)} and a batch of {batch} for values "
            f"{list(values.shape)}: give counts {[*each, *indices.shape[-3:]]}"
        )


# -- the function ----------------------------------------------------------------------------------------------------------


class _RouteSignal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, values: Tensor | None, indices: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        rules, filters, before_weighting, error_divisor, metrics, collect = rest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, indices, before_weighting, error_divisor)
        ctx.rules, ctx.filters, ctx.metrics, ctx.collect = rules, filters, metrics, collect
        scalar_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        # detach, which makes an alias with the version counter of y but no view: autograd lets nobody change a view in
        # place that a Function returned, and what follows a layer may well be nn.ReLU(inplace=True). Marking y itself as
        # changed would break a producer that has kept y. A leaf's value is nobody's to change: there a view is right.
        same = y.view_as(y) if y.is_leaf and y.requires_grad else y.detach()
        return same, torch.zeros((), dtype=scalar_dtype, device=y.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, scale = grads
        values, indices, before_weighting, error_divisor = ctx.saved_tensors
        rules, metrics = ctx.rules, ctx.metrics
        metrics.awaiting = max(metrics.awaiting - 1, 0)
        nothing = (None,) * 6
        if grad is None:
            return None, None, None, *nothing
        learns = rules.quantile is not None and values is not None
        damps = rules.damping_quantile is not None
        if not (learns or damps or metrics.wants_errors):
            return grad, None, None, *nothing
        request = Request(
            filters=ctx.filters,
            quantile=rules.quantile if learns else None,
            tolerance=rules.tolerance,
            damping_quantile=rules.damping_quantile,
            damping_tolerance=rules.damping_tolerance,
            damping_factor=rules.damping_factor,
            each=learns and (indices.dim() == 4 or values.dim() == 4),
            wants_errors=metrics.wants_errors,
        )
        of_labels = before_weighting if learns else None
        counts, damped, error_sum = signal_counts(grad, scale, of_labels, error_divisor, request)
        if metrics.wants_errors:
            metrics.add_errors(error_sum, grad.shape[0] * grad.shape[1] // ctx.filters)
        grad_values = None
        if learns:
            counts, indices, batch = ctx.collect(counts.to(values.dtype), indices, grad.shape[0])
            _check_collected(counts, indices, values, batch)
            grad_values, metrics.routing_loss = gate_gradient(values, counts, indices, scale, batch, rules.gate_share)
        return damped if damps else grad, grad_values, None, *nothing
