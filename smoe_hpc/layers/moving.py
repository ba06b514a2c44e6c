"""What happens to a layer that is moved or cast: ``model.to(...)``, ``half()``, ``to_empty(...)``, ``load_state_dict(...)``.

The first three reach a module as ``Module._apply(fn)``, fn mapping each tensor to its new one. What our layers add to it:
numbers that need float32 keep it, and a memory format for images is not put on filters that are no images. What a layer
computes by itself it computes again, since a tensor may come from the meta device, where it holds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.compat import dispatch_mode_active, is_func_tensor

Move = Callable[[Tensor], Tensor]
_NARROW = (torch.float16, torch.bfloat16)


def wide(old: Tensor, new: Tensor) -> Tensor:
    """``new``, which ``old`` was moved to; or, if it was cast to 16 bits, ``old`` moved without the cast."""
    return old.to(new.device) if new.dtype in _NARROW and old.dtype not in _NARROW else new


def wide_default() -> torch.dtype:
    """The default type, or float32 where that has 16 bits."""
    default = torch.get_default_dtype()
    return torch.float32 if default in _NARROW else default


def keeping_float32(move: Move) -> Move:
    """The move, without a cast to 16 bits."""
    return lambda tensor: wide(tensor, move(tensor))


def of_any_rank(move: Move) -> Move:
    """The move; where it is to a memory format that takes four dimensions, filters of five keep their own."""

    def moved(tensor: Tensor) -> Tensor:
        try:
            return move(tensor)
        except RuntimeError:
            if tensor.dim() <= 4:
                raise
            return move(tensor.flatten()).view(tensor.shape)

    return moved


def widen(state_dict: dict[str, Any], names: Iterable[str]) -> None:
    """Make 16-bit entries of a state dict float32, so that ``load_state_dict(..., assign=True)`` puts none in place."""
    for name in names:
        value = state_dict.get(name)
        if isinstance(value, Tensor) and value.dtype in _NARROW:
            state_dict[name] = value.detach().float()


def may_look(tensor: Tensor) -> bool:
    """Whether the numbers in a tensor can be asked for: not while something is traced, transformed or captured."""
    if torch.compiler.is_compiling() or dispatch_mode_active() or torch.jit.is_tracing():
        return False
    if tensor.is_meta or is_func_tensor(tensor):
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def autocast_type(device: str) -> torch.dtype | None:
    """The type that autocast computes in on a kind of device; None where it is off, or where there is none ("meta")."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Compute in the types that tensors have. Nothing where autocast is off, so that an exported graph has no trace of it."""
    return contextlib.nullcontext() if autocast_type(device) is None else torch.autocast(device, enabled=False)
