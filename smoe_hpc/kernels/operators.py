"""The operations ``smoe_hpc::expert_conv2d`` and its backward as torch knows them.

Registered are the forms that :mod:`smoe_hpc.kernels.expert_conv` chooses among, shapes for tracing, gradients of any order
and autocast, so that torch.compile and export see one operation.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.compat import below_autocast
from smoe_hpc.kernels import cpu, flops
from smoe_hpc.kernels.checks import check_arguments, check_gradient
from smoe_hpc.kernels.expert_conv import autocast, empty_output, memory_format, prepare, run_backward, run_forward
from smoe_hpc.kernels.ranges import check_indices

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


def _registered_forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
    """Indices are checked on a CPU only: a compiled graph's are new each time, and a check waits for the GPU."""
    check_arguments(x, weight, indices, padding)
    if not x.is_cuda and not cpu.serves(x):
        check_indices(indices, weight.shape[0])
    return run_forward(x, weight, indices, padding, prepare(x, weight, indices, padding, plan))


def _registered_backward(
    g: Tensor, x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor], *needs: bool
) -> tuple[Tensor, Tensor]:
    check_arguments(x, weight, indices, padding)
    check_gradient(g, x, weight, indices)
    dx, dw = run_backward(g, x, weight, indices, padding, prepare(x, weight, indices, padding, plan), *needs)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw


def _fake_forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
    check_arguments(x, weight, indices, padding)
    return empty_output(x, weight, indices)


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
    check_arguments(x, weight, indices, padding)
    check_gradient(g, x, weight, indices)
    layout = memory_format(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if needs_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if needs_weight else 0)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, indices, padding, plan = inputs
    ctx.save_for_backward(x, weight, indices, *plan)
    ctx.padding = padding


def _gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, weight, indices, *plan = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    dx, dw = torch.ops.smoe_hpc.expert_conv2d_backward.default(g, x, weight, indices, ctx.padding, plan, *needed)
    return dx if needed[0] else None, dw if needed[1] else None, None, None, [None] * len(plan)


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


def _autocast_kernel(device: str) -> Callable[..., Tensor]:
    def kernel(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Tensor:
        with below_autocast(device):
            x, weight = autocast(x, weight, device)
            return torch.ops.smoe_hpc.expert_conv2d.default(x, weight, indices, padding, plan)

    return kernel


for _device in ("CPU", "CUDA"):
    _library.impl("expert_conv2d", _registered_forward, _device)
    _library.impl("expert_conv2d_backward", _registered_backward, _device)
    _library.impl("expert_conv2d", _autocast_kernel(_device.lower()), f"Autocast{_device}")
torch.library.register_fake("smoe_hpc::expert_conv2d", _fake_forward, lib=_library)
torch.library.register_fake("smoe_hpc::expert_conv2d_backward", _fake_backward, lib=_library)
flops.register()
torch.library.register_autograd("smoe_hpc::expert_conv2d", _gradient, setup_context=_keep_inputs, lib=_library)
torch.library.register_autograd(
    "smoe_hpc::expert_conv2d_backward", _second_gradient, setup_context=_keep_backward_inputs, lib=_library
)
