"""Whether indices are a valid choice of experts: checked once for each tensor, since on a GPU that waits for the device.

A choice that :func:`smoe_hpc.kernels.select_experts` has made is valid and never checked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smoe_hpc.compat import version_of
from smoe_hpc.errors import ConfigError

_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of each tensor found valid: its version then, and N


def mark_right(indices: Tensor, num_experts: int) -> None:
    """Remember that ``indices`` are experts of 0..num_experts - 1, all different at a pixel, until they are written to."""
    if not torch.compiler.is_compiling():
        _found[indices] = (version_of(indices), num_experts)


def check_indices(indices: Tensor, num_experts: int) -> None:
    """Refuse indices out of range, and on a GPU an expert that a pixel selects twice.

    Nothing is checked while a CUDA graph is captured.

    Raises:
        ConfigError: some are not in 0..num_experts - 1, or some meet twice where kernels need them to differ.
    """
    if not indices.numel() or _found.get(indices) == (version_of(indices), num_experts):
        return
    if indices.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    found = list(indices.aminmax())
    if indices.is_cuda:
        ordered = indices.sort(-3).values
        found.append((ordered.diff(dim=-3) == 0).any().to(indices.dtype))
    low, high, *twice = torch.stack(found).tolist()
    if low < 0 or high >= num_experts:
        raise ConfigError(range_message(low, high, num_experts))
    if any(twice):
        raise ConfigError("indices name an expert twice at a pixel; on a GPU the experts of a pixel must differ")
    mark_right(indices, num_experts)


def range_message(low: int, high: int, num_experts: int) -> str:
    """The error for indices from ``low`` to ``high``."""
    return f"indices hold {low}..{high}, num_experts={num_experts}: give 0 to {num_experts - 1}"
