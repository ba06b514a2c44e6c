"""The operations ``smoe_hpc::expert_conv2d`` and its backward as torch knows them.

Registered are the forms that :mod:`smoe_hpc.kernels.dispatch` chooses among, shapes for tracing, gradients of any order and
autocast, so that torch.compile and export see one operation. Without tracing, an autograd.Function calls the same forms
directly: what torch wraps around a registered operation takes 0.1 ms a call, more than the kernel for a small layer.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import cpu, dispatch
from smoe_hpc.kernels.padding import check_padding
from smoe_hpc.kernels.ranges import check_indices

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_library = torch.library.Library("smoe_hpc", "FRAGMENT")
_library.define(
    "expert_conv2d(Tensor x, Tensor weight, Tensor indices, str padding, Tensor[] plan) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "expert_conv2d_backward(Tensor g, Tensor x, Tensor weight, Tensor indices, str padding, Tensor[] plan, bool needs_x, "
    "bool needs_weight) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def expert_conv2d(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
    """[B, K F, H, W]; see :func:`smoe_hpc.kernels.expert_conv2d`. Weights in float32 may go with a 16-bit input."""
    if _traced(x, weight):
        return torch.ops.smoe_hpc.expert_conv2d.default(x, weight, indices, padding, list(plan))
    return _ExpertConv.apply(x, weight, indices, padding, plan)


def autocast(x: Tensor, weight: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Input and weight as autocast has them on this device: float64 is left alone, float32 weights are rounded later."""
    if torch.float64 in (x.dtype, weight.dtype):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    if not (x.is_floating_point() and weight.is_floating_point()):
        return x, weight  # which are refused
    return x.to(dtype), weight if weight.dtype == torch.float32 else weight.to(dtype)


def _traced(x: Tensor, weight: Tensor) -> bool:
    """Whether somebody looks on (compiler, tensor subclass, mode) who is to see one operation, or has to: torch's dispatcher
    turns the sign of tensors that are negated without a copy, fills those that are zero without memory, and traces shapes.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(t) not in (Tensor, Parameter) or t.is_neg() or t._is_zerotensor() or t.is_meta for t in (x, weight))
    )


class _ExpertConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]
    ) -> Tensor:
        _check(x, weight, indices, padding)
        if not cpu.serves(x):  # which looks while it reads them
            check_indices(indices, weight.shape[0])
        prepared = dispatch.prepare(x, weight, indices, padding, plan)
        ctx.save_for_backward(x, weight, indices)
        ctx.padding, ctx.prepared = padding, prepared
        return dispatch.forward(x, weight, indices, padding, prepared)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or _traced(grads[0], weight):
            plan = ctx.prepared[0] if ctx.prepared else ()
            return _differentiable_backward(grads[0], x, weight, indices, ctx.padding, plan, needs_x, needs_weight)
        dx, dw = dispatch.backward(grads[0], x, weight, indices, ctx.padding, ctx.prepared, needs_x, needs_weight)
        return dx, dw, None, None, None


# -- what cannot be --------------------------------------------------------------------------------------------------------


def types_message(x: Tensor, weight: Tensor) -> str:
    """What is wrong with the types of input and weights that do not go together."""
    found = f"input is {x.dtype}, weights are {weight.dtype}"
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"{found}; give both as torch.float32, torch.float64, torch.bfloat16 or torch.float16"
    if torch.float64 in (x.dtype, weight.dtype):
        return f"{found}; convert one of them: torch.autocast leaves float64 alone"
    return f"{found}; convert one of them, or use torch.autocast"


def _check(x: Tensor, weight: Tensor, indices: Tensor, padding: str) -> None:
    _check_dense(("input", x), ("weights", weight), ("indices", indices))
    if x.dim() != 4 or weight.dim() != 5 or indices.dim() not in (3, 4):
        raise ConfigError(
            f"input {list(x.shape)}, weight {list(weight.shape)}, indices {list(indices.shape)}: give [B, C, H, W], "
            "[N, F, C, k, k] and [K, H, W] or [B, K, H, W]"
        )
    batch, channels, height, width = x.shape
    num_experts, _, weight_channels, size, other_size = weight.shape
    check_padding(padding, (height, width), size)
    if weight_channels != channels or other_size != size:
        raise ConfigError(f"weight {list(weight.shape)} does not fit an input of {channels} channels: [N, F, {channels}, k, k]")
    if indices.shape[-2:] != x.shape[-2:] or (indices.dim() == 4 and indices.shape[0] not in (1, batch)):
        raise ConfigError(
            f"indices {list(indices.shape)} do not fit input {list(x.shape)}: give [K, {height}, {width}], or one choice "
            f"for each sample, [{batch}, K, {height}, {width}]"
        )
    if not 1 <= indices.shape[-3] <= num_experts:
        raise ConfigError(f"{indices.shape[-3]} experts a pixel selected of {num_experts}: select one at least, all at most")
    if indices.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"indices are {indices.dtype}; give torch.int64 or torch.int32")
    if x.dtype not in _DTYPES or (weight.dtype != x.dtype and (weight.dtype, x.itemsize) != (torch.float32, 2)):
        raise ConfigError(types_message(x, weight))
    if not x.device == weight.device == indices.device:
        raise ConfigError(
            f"input is on {x.device}, weights on {weight.device}, indices on {indices.device}; move them to one device"
        )


def _check_dense(*tensors: tuple[str, Tensor]) -> None:
    for what, tensor in tensors:
        if tensor.layout != torch.strided:
            raise ConfigError(f"{what} {list(tensor.shape)}: {tensor.layout} is not served; give a dense tensor (to_dense)")


def _check_gradient(g: Tensor, x: Tensor, weight: Tensor, indices: Tensor) -> None:
    """Of arguments that :func:`_check` has found right."""
    _check_dense(("gradient", g))
    expected = [x.shape[0], indices.shape[-3] * weight.shape[1], *x.shape[2:]]
    if list(g.shape) != expected:
        raise ConfigError(f"gradient {list(g.shape)} does not fit the output {expected}; give one of its shape")
    if g.device != x.device:
        raise ConfigError(f"gradient is on {g.device}, input on {x.device}; move them to one device")


# -- registration ----------------------------------------------------------------------------------------------------------


def _registered_forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
    """Indices are looked at on a CPU only: a compiled graph's are new each time, and looking waits for the GPU."""
    _check(x, weight, indices, padding)
    if not x.is_cuda and not cpu.serves(x):
        check_indices(indices, weight.shape[0])
    return dispatch.forward(x, weight, indices, padding, dispatch.prepare(x, weight, indices, padding, plan))


def _registered_backward(
    g: Tensor, x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor], *needs: bool
) -> tuple[Tensor, Tensor]:
    _check(x, weight, indices, padding)
    _check_gradient(g, x, weight, indices)
    dx, dw = dispatch.backward(g, x, weight, indices, padding, dispatch.prepare(x, weight, indices, padding, plan), *needs)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw


def _fake_forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
    _check(x, weight, indices, padding)
    return dispatch.empty_output(x, weight, indices)


def _fake_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    padding: str,
    plan: Sequence[Tensor],
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, indices, padding)
    _check_gradient(g, x, weight, indices)
    layout = dispatch.memory_format(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if needs_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if needs_weight else 0)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, indices, padding, plan = inputs
    ctx.save_for_backward(x, weight, indices, *plan)
    ctx.padding = padding


def _gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, weight, indices, *plan = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    dx, dw, *_ = _differentiable_backward(g, x, weight, indices, ctx.padding, plan, *needed)
    return dx, dw, None, None, [None] * len(plan)


def _differentiable_backward(
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


def _keep_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    g, x, weight, indices, padding, plan, needs_x, needs_weight = inputs
    ctx.save_for_backward(g, x, weight, indices, *plan)
    ctx.padding, ctx.needs_x, ctx.needs_weight = padding, needs_x, needs_weight
    ctx.set_materialize_grads(False)


def _second_gradient(ctx: Any, to_dx: Tensor | None, to_dw: Tensor | None) -> tuple[Any, ...]:
    """Both gradients are bilinear, so their gradients are the same operations with other arguments."""
    g, x, weight, indices, *plan = ctx.saved_tensors
    conv, back = torch.ops.smoe_hpc.expert_conv2d.default, torch.ops.smoe_hpc.expert_conv2d_backward.default
    rest = (indices, ctx.padding, plan)
    to_g = to_x = to_weight = None
    if ctx.needs_x and to_dx is not None:
        to_g = conv(to_dx, weight, *rest)
        to_weight = back(g, to_dx, weight, *rest, False, True)[1]
    if ctx.needs_weight and to_dw is not None:
        more = conv(x, to_dw, *rest)
        to_g = more if to_g is None else to_g + more
        to_x = back(g, x, to_dw, *rest, True, False)[0]
    return to_g, to_x, to_weight, None, None, [None] * len(plan), None, None


def _autocast_kernel(device: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    def kernel(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            x, weight = autocast(x, weight, device)
            return torch.ops.smoe_hpc.expert_conv2d.default(x, weight, indices, padding, plan)

    return kernel


for _device in ("CPU", "CUDA"):
    _library.impl("expert_conv2d", _registered_forward, _device)
    _library.impl("expert_conv2d_backward", _registered_backward, _device)
    _key = getattr(torch._C.DispatchKey, f"Autocast{_device}")
    _library.impl("expert_conv2d", _autocast_kernel(_device.lower(), _key), f"Autocast{_device}")
torch.library.register_fake("smoe_hpc::expert_conv2d", _fake_forward, lib=_library)
torch.library.register_fake("smoe_hpc::expert_conv2d_backward", _fake_backward, lib=_library)
torch.library.register_autograd("smoe_hpc::expert_conv2d", _gradient, setup_context=_keep_inputs, lib=_library)
torch.library.register_autograd(
    "smoe_hpc::expert_conv2d_backward", _second_gradient, setup_context=_keep_backward_inputs, lib=_library
)
