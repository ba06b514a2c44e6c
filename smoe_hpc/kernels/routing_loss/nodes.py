"""What the routing loss puts behind a layer in autograd's graph: two nodes, the identity in forward.

    y -> _LabelAndDamp -> [times weights] -> _Keep -> output
              \\-> scalar

_Keep holds what backward needs, and the scalar, and is of the output alone: they live as long as it does. _LabelAndDamp finds
the labels, damps, and makes the gate's gradient: from the gradient that _Keep saw and the scale that came to the scalar.

Derivatives. A backward that is recorded (create_graph) gives linear maps of its incoming gradient, labels and damping being
constants, so they are made of differentiable operations; :class:`_Damp` applies the damping. When autograd comes back through
a recorded backward, what it adds at an output is no gradient of a loss of which labels could be made: the forwards it can
reach are marked, and use what they found when they were recorded.

Dimensions: B batch, N experts, K selected, F filters per expert, O = K F output channels, H latitude rows, W longitude columns.
Values may be [B, N, H, W], indices and counts [B, K, H, W].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.compat import backward_keeps_graph, current_backward, node_class
from smoe_hpc.errors import SmoeError
from smoe_hpc.kernels.routing_loss.operators import damping_factors, gate_gradient, gate_gradient_fallback, label_and_damp
from smoe_hpc.kernels.routing_loss.request import Request
from smoe_hpc.kernels.routing_loss.shapes import check_collected
from smoe_hpc.kernels.routing_loss.state import Attachment, LabelsAndDamping, OutputGradient, PendingForward

Kept = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]  # values, indices, before weighting, error divisor


def connect(
    y_BOHW: Tensor,
    weights: Tensor | None,
    auxiliary: Tensor | None,
    kept: Kept,
    attachment: Attachment,
    pending: PendingForward,
) -> tuple[Tensor, Tensor]:
    """Output and scalar of :func:`smoe_hpc.kernels.attach_routing_loss`, with the nodes behind them."""
    leaf = y_BOHW.is_leaf and y_BOHW.requires_grad
    y_BOHW, scalar = _LabelAndDamp.apply(y_BOHW, kept[0], auxiliary, attachment)
    if weights is not None:
        y_BOHW = y_BOHW * weights
    pending.scalar, pending.auxiliary = scalar, auxiliary is not None
    return _Keep.apply(y_BOHW, leaf and weights is None, attachment, pending, *kept), scalar


def _same(y: Tensor, leaf: bool) -> Tensor:
    # detach, which makes an alias with the version counter of y but no view: autograd forbids changing a view in
    # place that a Function returned, and what follows a layer may well be nn.ReLU(inplace=True). Marking y itself as
    # changed would break a producer that has kept y. A leaf's value must not change: there a view is right.
    return y.view_as(y) if leaf else y.detach()


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_BOHW: Tensor, leaf: bool, attachment: Attachment, pending: PendingForward, *kept: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.attachment, ctx.pending = attachment, pending  # with the scalar, which so lives as long as the output
        return _same(y_BOHW, leaf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_BOHW,) = grads
        nothing = (None,) * 7
        if grad_BOHW is not None:
            scale = ctx.pending.take_scale(current_backward())
            ctx.attachment.at_output = OutputGradient(grad_BOHW, ctx.saved_tensors, scale, ctx.pending.asked_before)
            if not backward_keeps_graph():
                ctx.pending.done = True
        return grad_BOHW, *nothing


class _LabelAndDamp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_BOHW: Tensor, values_NHW: Tensor | None, auxiliary: Tensor | None, attachment: Attachment
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.attachment = attachment
        ctx.auxiliary_type = None if auxiliary is None else (auxiliary.device, auxiliary.dtype)
        dtype = torch.float64 if y_BOHW.dtype == torch.float64 else torch.float32
        scalar = torch.zeros((), dtype=dtype, device=y_BOHW.device)
        if auxiliary is not None:
            scalar += auxiliary.detach().to(dtype)
        return _same(y_BOHW, y_BOHW.is_leaf and y_BOHW.requires_grad), scalar

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_BOHW, scale = grads
        attachment: Attachment = ctx.attachment
        at_output, attachment.at_output = attachment.at_output, None
        if scale is None and at_output is not None:
            scale = at_output.scale
        if scale is not None:
            scale = scale.abs()
        number = current_backward()
        again = attachment.again == number
        to_auxiliary = None
        if ctx.auxiliary_type is not None and (scale is not None or (grad_BOHW is not None and not again)):
            one = torch.ones(()) if scale is None else scale
            to_auxiliary = (one * attachment.share()).to(*ctx.auxiliary_type)
        if grad_BOHW is None or at_output is None:  # the output is no part of this loss
            return None, None, to_auxiliary, None
        if again:
            to_y_BOHW, to_values_NHW = _derivative(grad_BOHW, scale, at_output, attachment, number)
        else:
            _check_scale(scale, at_output, attachment, number)
            to_y_BOHW, to_values_NHW = _label_and_damp(grad_BOHW, scale, at_output, attachment, number)
        return to_y_BOHW, to_values_NHW, to_auxiliary, None


def _check_scale(scale: Tensor | None, at_output: OutputGradient, attachment: Attachment, number: int) -> None:
    if scale is not None:
        return
    if at_output.asked_before:
        raise SmoeError(
            "routing_loss(model) was called before the forward that this backward belongs to, so that the loss's scale is "
            "lost; call it after the forward and add it to the loss (or never, where the loss is not scaled)"
        )
    attachment.metrics.note_no_scale(number)


# -- a loss's backward -----------------------------------------------------------------------------------------------------


def _label_and_damp(
    grad_BOHW: Tensor, scale: Tensor | None, at_output: OutputGradient, attachment: Attachment, number: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the experts' outputs and to the gate's values, in backward pass ``number``."""
    values_NHW, indices_KHW, before_weighting_BOHW, error_divisor_HW = at_output.kept
    rules, metrics = attachment.rules, attachment.metrics
    learns = rules.quantile is not None and values_NHW is not None
    damps = rules.damping_quantile is not None
    recorded = torch.is_grad_enabled()
    if not (learns or damps or metrics.wants_errors or recorded):
        return grad_BOHW, None
    assert indices_KHW is not None
    request = Request(
        filters=attachment.filters,
        quantile=rules.quantile if learns else None,
        tolerance=rules.tolerance,
        damping_quantile=rules.damping_quantile,
        damping_tolerance=rules.damping_tolerance,
        damping_factor=rules.damping_factor,
        each=learns and (indices_KHW.dim() == 4 or (values_NHW is not None and values_NHW.dim() == 4)),
        wants_errors=metrics.wants_errors,
    )
    fused = damps and not recorded and not attachment.apart
    with torch.no_grad():
        g_BOHW, s = at_output.grad.detach(), None if scale is None else scale.detach()
        batch, channels = g_BOHW.shape[:2]
        asked = request if fused else request._replace(damping_quantile=None)
        counts_KHW, damped_BOHW, error_sum_HW = label_and_damp(
            g_BOHW, s, before_weighting_BOHW if learns else None, error_divisor_HW, asked
        )
        factors_BOHW = damping_factors(g_BOHW, s, error_divisor_HW, request) if damps and not fused else None
        if metrics.wants_errors:
            metrics.add_errors(error_sum_HW, batch * channels // attachment.filters)
        found = LabelsAndDamping(factors_BOHW)
        if learns and values_NHW is not None:
            counts_KHW, indices_KHW, batch = attachment.collect(counts_KHW.to(values_NHW.dtype), indices_KHW, batch)
            check_collected(counts_KHW, indices_KHW, values_NHW, batch)
            found = LabelsAndDamping(factors_BOHW, counts_KHW, indices_KHW, batch)
    to_values_NHW = _teach(values_NHW, found, scale, attachment, number) if learns else None
    if recorded:
        attachment.recorded[number] = found
        return _with_reached(_Damp.apply(grad_BOHW, factors_BOHW, attachment, number)), to_values_NHW
    if fused:
        return damped_BOHW, to_values_NHW
    return grad_BOHW if factors_BOHW is None else grad_BOHW * factors_BOHW, to_values_NHW


def _teach(
    values_NHW: Tensor | None, found: LabelsAndDamping, scale: Tensor | None, attachment: Attachment, number: int
) -> Tensor:
    """The gradient to the gate's values; the routing loss goes to the metrics."""
    assert values_NHW is not None
    assert found.counts is not None
    assert found.indices is not None
    known = (values_NHW, found.counts, found.indices, scale, found.batch, attachment.share())
    if not torch.is_grad_enabled():
        to_values_NHW, attachment.metrics.routing_loss = gate_gradient(*known)
        return to_values_NHW
    to_values_NHW, loss = gate_gradient_fallback(*known)
    attachment.metrics.routing_loss = loss.detach()
    return _with_reached(_Damp.apply(to_values_NHW, None, attachment, number))


# -- derivatives of a recorded backward ------------------------------------------------------------------------------------


def _derivative(
    grad_BOHW: Tensor, scale: Tensor | None, at_output: OutputGradient, attachment: Attachment, number: int
) -> tuple[Tensor | None, Tensor | None]:
    """The same, of labels and damping that were found before."""
    found = attachment.held
    if found is None:
        raise SmoeError(
            "second derivatives through a SpatialMoE2d whose own gradient was not asked for, so that its labels and damping "
            "are not known; ask in autograd.grad(..., create_graph=True) for its parameters or input, too"
        )
    if torch.is_grad_enabled():
        attachment.recorded[number] = found
        grad_BOHW = _with_reached(_Damp.apply(grad_BOHW, found.factors, attachment, number))
    elif found.factors is not None:
        grad_BOHW = grad_BOHW * found.factors
    if found.counts is None:
        return grad_BOHW, None
    if scale is None:
        warnings.warn(
            "second derivatives through SpatialMoE2d: in this backward no gate learns by the routing loss, which enters here "
            "by routing_loss(model) alone; add that to the loss, if they should",
            stacklevel=2,
        )
        return grad_BOHW, None
    return grad_BOHW, _teach(at_output.kept[0], found, scale, attachment, number)


class _Damp(torch.autograd.Function):
    """Multiply a gradient with factors, and tell what a derivative of it can reach when there is one."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, factors: Tensor | None, attachment: Attachment, number: int) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.attachment, ctx.number = attachment, number
        ctx.reached = []
        return grad.detach() if factors is None else grad * factors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        number = current_backward()
        for attachment in ctx.reached:
            attachment.come_back(number, ctx.number)
        if torch.is_grad_enabled():
            grad = _with_reached(_Damp.apply(grads[0], factors, ctx.attachment, number))
        else:
            grad = grads[0] if factors is None else grads[0] * factors
        return grad, None, None, None


def _with_reached(damped: Tensor) -> Tensor:
    """The result of :class:`_Damp`, whose node gets the list of all forwards that a backward through it meets."""
    node: Any = damped.grad_fn
    if node is not None:
        labelling: Any = node_class(_LabelAndDamp)
        node.reached = [other.attachment for other in nodes_behind(node) if isinstance(other, labelling)]
    return damped


def nodes_behind(node: Any) -> Iterator[Any]:
    """The nodes of autograd's graph that a backward from this one reaches, each once, this one first."""
    found, to_visit = {node}, [node]
    while to_visit:
        node = to_visit.pop()
        yield node
        for other, _ in node.next_functions:
            if other is not None and other not in found:
                found.add(other)
                to_visit.append(other)
