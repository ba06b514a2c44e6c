"""The scalars that layers leave for their forwards, added up for the loss; see :func:`smoe_hpc.layers.routing_loss`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.compat import current_backward, node_number
from smoe_hpc.errors import SmoeError
from smoe_hpc.kernels import PendingForward, RoutingLossMetrics
from smoe_hpc.kernels.routing_loss.nodes import nodes_behind
from smoe_hpc.layers.gates.sharing import Together


@dataclass(frozen=True, eq=False)
class Forward:
    """A layer's forward whose backward may come, and the layers that use its gate together with it."""

    pending: PendingForward
    together: Together | None


def add_up(forwards: list[Forward], layers: Iterable[RoutingLossMetrics]) -> Tensor:
    """The sum of the forwards' scalars; 0-d.

    Args:
        forwards: at least one.
        layers: metrics of all layers that the sum was asked for.

    Raises:
        SmoeError: in backward, where a forward has its scale from another sum, too, or a layer of the loss has none.
    """
    each = [forward.pending for forward in forwards]
    shares = [1.0 if forward.together is None else 1.0 / forward.together.count() for forward in forwards]
    leaves = [] if _are_one_graph(each) else _leaves_behind(each)
    if leaves:
        return _SumOfSeveral.apply(each, list(layers), shares, *leaves)
    return _Sum.apply(each, list(layers), shares, *[one.scalar for one in each])


def _are_one_graph(forwards: list[PendingForward]) -> bool:
    """Whether a backward from the forward made last reaches all the others, as in a chain of layers."""
    if len(forwards) == 1:
        return True
    nodes: set[Any] = {one.scalar.grad_fn for one in forwards if one.scalar is not None}
    missing = len(nodes)
    for node in nodes_behind(max(nodes, key=node_number)):
        missing -= node in nodes
        if not missing:
            return True
    return False


def _leaves_behind(forwards: list[PendingForward]) -> list[Tensor]:
    """What gradients of these forwards can be asked for: leaves of the graph, parameters of the model or not, each once."""
    leaves: dict[int, Tensor] = {}
    for forward in forwards:
        if forward.scalar is not None and forward.scalar.grad_fn is not None:
            for node in nodes_behind(forward.scalar.grad_fn):
                leaf = getattr(node, "variable", None)
                if leaf is not None:
                    leaves[id(leaf)] = leaf
    return list(leaves.values())


def _sum(forwards: list[PendingForward], shares: list[float]) -> Tensor:
    """Auxiliary losses, shared out among the layers of a gate; other scalars are known to be zero."""
    assert forwards[0].scalar is not None
    total = torch.zeros_like(forwards[0].scalar)
    for forward, share in zip(forwards, shares, strict=True):
        if forward.auxiliary and forward.scalar is not None:
            total = total + forward.scalar.detach().to(total.device) * share
    return total


def _note(ctx: Any) -> int:
    """Note that the scale of the loss came to these forwards; returns the number of the backward pass."""
    number = current_backward()
    for forward in ctx.forwards:
        of, by = forward.read
        if of == number and by is not ctx.reading:
            raise SmoeError(
                "routing_loss was added to one loss more than once (for the model and a part of it, or read again), which "
                "counts the loss's scale twice; add it once"
            )
        forward.read = (number, ctx.reading)
    for layer in ctx.layers:
        layer.note_scale(number)
    return number


class _Sum(torch.autograd.Function):
    """The scale reaches each forward whole, through its scalar."""

    @staticmethod
    def forward(
        ctx: Any, forwards: list[PendingForward], layers: list[RoutingLossMetrics], shares: list[float], *scalars: Tensor
    ) -> Tensor:
        ctx.reading = object()  # identifies this sum to its forwards, which must not hold on to its graph
        ctx.forwards, ctx.layers, ctx.like = forwards, layers, [(scalar.device, scalar.dtype) for scalar in scalars]
        return _sum(forwards, shares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _note(ctx)
        return None, None, None, *(grads[0].to(device, dtype) for device, dtype in ctx.like)


class _SumOfSeveral(torch.autograd.Function):
    """Of forwards of several graphs. They may have backwards of their own, and the first of these would free the graphs of all
    if it went through their scalars: the engine runs every node that it can reach. So the scale is left with the forwards and
    the node leads to the leaves of those graphs alone, which keep nothing.

    The engine runs what was made later first, and this was made after the forwards. Where it does not (a loss put together on
    several devices), a forward found no scale, which :meth:`RoutingLossMetrics.note_scale` says.
    """

    @staticmethod
    def forward(
        ctx: Any, forwards: list[PendingForward], layers: list[RoutingLossMetrics], shares: list[float], *leaves: Tensor
    ) -> Tensor:
        ctx.reading = object()
        ctx.forwards, ctx.layers, ctx.leaves = forwards, layers, len(leaves)
        return _sum(forwards, shares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        number = _note(ctx)
        for forward in ctx.forwards:
            assert forward.scalar is not None
            forward.scale = (number, grads[0].to(forward.scalar.device, forward.scalar.dtype))
        return (None,) * (3 + ctx.leaves)
