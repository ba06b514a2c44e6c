"""The routing classification loss and the damping of wrong experts, inside the layer's own backward.

Dimensions: B batch, N experts, K selected, F filters per expert, H latitude rows, W longitude columns, P = H W pixels.

Forward, :func:`attach_routing_loss` is the identity, plus a scalar of value zero. A caller who adds the scalar to the loss of
the task does not change it, but the gradient ``s`` that comes back to the scalar is the factor by which the caller scaled it
(accumulation, loss scale): the exact scale of the routing loss. Without it, s = 1. Its size counts and not its sign: a
score that is maximised by descending its negative needs the same labels, the same damping and a gate that learns. Auxiliary
losses of the gate are the scalar's value; they take effect at the same scale.

Backward, with g = dL/dy the gradient at the layer's output (paper, section 3; sizes as the published code has them):

    err[b,k,p]   = mean over F of |g| numel(g) / 2 / |s|        (weighted: |g times the output before weighting|)
    t_b          = quantile of err[b] over all K, H, W
    correct      = err <= t_b + tolerance
    label[b,e,p] = 1 selected and correct, 0 selected and wrong, else (wrong at p) / (N - K)
    RC           = mean over B, N, P of binary cross-entropy with logits between the gate's values and the labels

The labels enter only through their sum over the batch, so counts [K, H, W] carry everything, and

    dRC/dvalue[e,p] = (B sigmoid(value) - sum_b label) / (B N P)

needs nothing of size B x N x P unless the gate's own values have it. The two halves, up to the counts and from them on, are
operators of :mod:`smoe_hpc.kernels.routing_loss.operators`; the nodes of autograd's graph are in
:mod:`smoe_hpc.kernels.routing_loss.nodes`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.routing_loss.metrics import RoutingLossMetrics
from smoe_hpc.kernels.routing_loss.nodes import connect
from smoe_hpc.kernels.routing_loss.rules import RoutingLossRules
from smoe_hpc.kernels.routing_loss.shapes import check_values
from smoe_hpc.kernels.routing_loss.state import Attachment, Collect, PendingForward, everything, whole


# Backward writes to a Python object, which a compiled graph cannot do: torch.compile breaks the graph here.
@torch.compiler.disable
def attach_routing_loss(
    y: Tensor,
    values: Tensor | None,
    indices: Tensor,
    rules: RoutingLossRules,
    *,
    filters: int = 1,
    before_weighting: Tensor | None = None,
    error_divisor: Tensor | None = None,
    metrics: RoutingLossMetrics | None = None,
    collect: Collect = everything,
    auxiliary: Tensor | None = None,
    weights: Tensor | None = None,
    share: Callable[[], float] = whole,
    pending: PendingForward | None = None,
) -> tuple[Tensor, Tensor]:
    """The identity in forward; the gate's gradient and damping in backward.

    Derivatives of any order are right: labels and damping, found in the backward that is recorded
    (``create_graph``), are constants in its derivatives, into which the routing loss enters by the scalar alone.

    Shapes and devices are checked, but nothing that would wait for a device: indices are those of an expert_conv2d, which
    has checked their numbers.

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
        auxiliary: 0-d, weighted auxiliary losses of the gate, for the gate's sake alone.
        weights: broadcast to y, which is multiplied with them first. Damping then acts on the gradient of y, by the errors at
            the product, and leaves the weights' own gradient alone. For weights that learn from the task.
        share: called in backward, gives 1 / number of layers that share the gate, whose gradient is the mean of theirs.
        pending: records the progress of this forward and its backward.

    Returns:
        y (times weights) and the scalar that carries the scale: zero, or the auxiliary losses. What is returned for y lies in
        the memory of ``y``, unless there are weights, and may be changed in place; ``y`` itself is then not to be read any
        more. Autograd refuses the change where an operation before has kept y for its backward, and where y is a leaf.

    Raises:
        ConfigError: shapes that do not go together, or tensors on several devices; of what ``collect`` returns, in backward.
        SmoeError: in backward, where the scale was lost, or second derivatives would be wrong; the message says why.
    """
    _check(y, values, indices, filters, before_weighting, error_divisor)
    if values is not None and collect is everything:  # others say in backward which pixels' indices these values go with
        check_values(values, indices, y.shape[0])
    attachment = Attachment(rules, filters, metrics or RoutingLossMetrics(), collect, share, apart=weights is not None)
    kept = (values, indices, before_weighting, error_divisor)
    return connect(y, weights, auxiliary, kept, attachment, pending or PendingForward())


# -- invalid arguments -----------------------------------------------------------------------------------------------------


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
