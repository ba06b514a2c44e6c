"""Which form runs an expert convolution: compiled kernels of the GPU, of the CPU, or plain torch.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from smoe_hpc.kernels import cpu, torch_forms
from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.planning import suits_tiles

Prepared = tuple[Sequence[Tensor], Tensor]  # what a GPU's kernels share: the plan, and the packed weights


def prepare(x: Tensor, weight: Tensor, indices: Tensor, padding: str, plan: Sequence[Tensor]) -> Prepared | None:
    """What forward and backward need of the compiled kernels of a GPU; None where others are to run."""
    convolution = _cuda(x) if suits_tiles(x.dtype, x.shape[0], weight.shape, indices.shape) else None
    if convolution is None:
        return None
    try:
        return convolution.prepare(x, weight, indices, padding, plan)
    except Unsupported:
        return None


def forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, prepared: Prepared | None) -> Tensor:
    """[B, K F, H, W], from arguments that go together; ``prepared`` as :func:`prepare` gives it."""
    convolution = _cuda(x)
    if convolution is not None and prepared is not None:
        with contextlib.suppress(Unsupported):
            return _laid_out(convolution.forward(x, weight, indices, padding, *prepared), x)
    if cpu.serves(x):
        y = empty_output(x, weight, indices)
        cpu.forward(x, weight, indices, padding, y)
        return y
    return _laid_out(torch_forms.forward(x, weight, indices, padding), x)


def backward(
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
    dx, dw = torch_forms.backward(g, x, weight, indices, padding, needs_x, needs_weight)
    return None if dx is None else _laid_out(dx, x), dw


def _cuda(x: Tensor) -> ModuleType | None:
    """The compiled kernels of the GPU that a tensor is on; None where there are none."""
    if not x.is_cuda or not library.available(x.get_device()):
        return None
    from smoe_hpc.kernels.cuda import convolution

    return convolution


def memory_format(x: Tensor) -> torch.memory_format:
    """How outputs of this input lie in memory: channels last on a GPU, on a CPU as the input."""
    if x.device.type == "cuda":
        return torch.channels_last
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    return result.contiguous(memory_format=memory_format(x))


def empty_output(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Memory [B, K F, H, W] for the output."""
    shape = (x.shape[0], indices.shape[-3] * weight.shape[1], x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
