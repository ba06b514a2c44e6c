"""Convolution with the filters of the experts that each pixel selected.

What runs it: compiled kernels of the GPU (:mod:`smoe_hpc.kernels.cuda`) or the CPU (:mod:`smoe_hpc.kernels.cpu`), or torch
(:mod:`smoe_hpc.kernels.fallback`) where there is no compiler or ``SMOE_KERNELS=torch``. An autograd.Function calls them
directly. Where a compiler or a tensor subclass looks on, the operation registered in :mod:`smoe_hpc.kernels.operators` does:
what torch wraps around that takes 0.1 ms a call, more than the kernel for a small layer.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from smoe_hpc.compat import dispatch_mode_active, is_zero_without_memory
from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import cpu, fallback
from smoe_hpc.kernels.checks import check_arguments, types_message
from smoe_hpc.kernels.cuda import convolution, library
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.planning.cost import suits_tiles
from smoe_hpc.kernels.ranges import check_indices

Prepared = tuple[Sequence[Tensor], Tensor]  # what a GPU's kernels share: the plan, and the packed weights


def expert_conv2d(x: Tensor, weight: Tensor, indices: Tensor, *, padding: str = "zeros", plan: Sequence[Tensor] = ()) -> Tensor:
    """Each pixel's selected experts applied to the input around it.

    Under autocast it computes in autocast's type, unless one of the tensors is float64.

    Args:
        x: [B, C, H, W]; float32, float64, bfloat16 or float16.
        weight: [N, F, C, k, k], k odd.
        indices: [K, H, W] or [B, K, H, W], int64 or int32 in 0..N-1; on a GPU all different at a pixel. On a GPU they are
            checked once, in eager mode only: in a compiled or captured graph they have to be right.
        padding: "zeros", "periodic_longitude" or "sphere"; see :func:`smoe_hpc.kernels.padding.pad`.
        plan: tensors of the plan of these indices, for the kernels of a GPU; without them every call makes one.

    Returns:
        [B, K F, H, W]; channel ``k * F + f`` is filter f of the k-th selected expert. Channels last on a GPU, on a CPU
        in the memory format of ``x``.

    Raises:
        ConfigError: inconsistent shapes, unsupported types, input and weights of different types outside autocast, sparse
            tensors, tensors on several devices, indices out of range, or on a GPU an expert that a pixel selects twice.
    """
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        x, weight = autocast(x, weight, device)
    elif x.dtype != weight.dtype:
        raise ConfigError(types_message(x, weight))
    if is_traced(x, weight):
        return torch.ops.smoe_hpc.expert_conv2d.default(x, weight, indices, padding, list(plan))
    return _ExpertConv.apply(x, weight, indices, padding, plan)


def autocast(x: Tensor, weight: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Input and weight in autocast's type for this device: float64 is left alone, float32 weights are rounded later."""
    if torch.float64 in (x.dtype, weight.dtype):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    if not (x.is_floating_point() and weight.is_floating_point()):
        return x, weight  # which are refused
    return x.to(dtype), weight if weight.dtype == torch.float32 else weight.to(dtype)


def is_traced(x: Tensor, weight: Tensor) -> bool:
    """Whether the registered operation is to be called: for a compiler, a tensor subclass or a dispatch mode, which see one
    operation, and for tensors that only torch's dispatcher can read (negated without a copy, zero without memory, meta).
    """
    return (
        torch.compiler.is_compiling()
        or dispatch_mode_active()
        or any(type(t) not in (Tensor, Parameter) or t.is_neg() or is_zero_without_memory(t) or t.is_meta for t in (x, weight))
    )


class _ExpertConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
        check_arguments(x, weight, indices, padding)
        if not cpu.serves(x):  # the CPU's kernels check while they read them
            check_indices(indices, weight.shape[0])
        prepared = prepare(x, weight, indices, padding, plan)
        ctx.save_for_backward(x, weight, indices)
        ctx.padding, ctx.prepared = padding, prepared
        return run_forward(x, weight, indices, padding, prepared)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or is_traced(grads[0], weight):
            plan = ctx.prepared[0] if ctx.prepared else ()
            return _traced_backward(grads[0], x, weight, indices, ctx.padding, plan, needs_x, needs_weight)
        dx, dw = run_backward(grads[0], x, weight, indices, ctx.padding, ctx.prepared, needs_x, needs_weight)
        return dx, dw, None, None, None


def _traced_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    padding: str,
    plan: Sequence[Tensor],
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, ...]:
    dx, dw = torch.ops.smoe_hpc.expert_conv2d_backward.default(
        g, x, weight, indices, padding, list(plan), needs_x, needs_weight
    )
    return dx if needs_x else None, dw if needs_weight else None, None, None, None


# -- which implementation runs ---------------------------------------------------------------------------------------------


def prepare(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Prepared | None:
    """What the compiled kernels of a GPU share between forward and backward; None where they do not run."""
    convolution = _cuda(x) if suits_tiles(x.dtype, x.shape[0], weight.shape, indices.shape) else None
    if convolution is None:
        return None
    try:
        return convolution.prepare(x, weight, indices, padding, plan)
    except Unsupported:
        return None


def run_forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, prepared: Prepared | None) -> Tensor:
    """[B, K F, H, W], from checked arguments; ``prepared`` is what :func:`prepare` returned."""
    convolution = _cuda(x)
    if convolution is not None and prepared is not None:
        with contextlib.suppress(Unsupported):
            return _laid_out(convolution.forward(x, weight, indices, padding, *prepared), x)
    if cpu.serves(x):
        y = empty_output(x, weight, indices)
        cpu.forward(x, weight, indices, padding, y)
        return y
    return _laid_out(fallback.forward(x, weight, indices, padding), x)


def run_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    padding: str,
    prepared: Prepared | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and weight, where they are needed, from g [B, K F, H, W]."""
    if g.dtype != x.dtype:
        g = g.to(x.dtype)
    dx: Tensor | None
    dw: Tensor | None
    convolution = _cuda(x)
    if convolution is not None and prepared is not None:
        with contextlib.suppress(Unsupported):
            dx, dw = convolution.backward(g, x, weight, indices, padding, *prepared, needs_x, needs_weight)
            return None if dx is None else _laid_out(dx, x), dw
    if cpu.serves(x):
        dx = torch.empty(x.shape, dtype=x.dtype, memory_format=memory_format(x)) if needs_x else None
        dw = torch.empty(weight.shape, dtype=weight.dtype) if needs_weight else None
        cpu.backward(g, x, weight, indices, padding, dx, dw)
        return dx, dw
    dx, dw = fallback.backward(g, x, weight, indices, padding, needs_x, needs_weight)
    return None if dx is None else _laid_out(dx, x), dw


def _cuda(x: Tensor) -> ModuleType | None:
    """The compiled kernels of the GPU that a tensor is on; None where there are none."""
    if not x.is_cuda or not library.available(x.get_device()):
        return None
    return convolution


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of outputs: channels last on a GPU, on a CPU that of the input."""
    if x.device.type == "cuda":
        return torch.channels_last
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    return result.contiguous(memory_format=memory_format(x))


def empty_output(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """An uninitialised output [B, K F, H, W]."""
    shape = (x.shape[0], indices.shape[-3] * weight.shape[1], x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
