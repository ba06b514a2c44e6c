"""Whether indices name experts that there are: looked at once for each tensor, since on a GPU that waits for the device.

A choice that :func:`smoe_hpc.kernels.select_experts` has made is known to be in range and never looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smoe_hpc.errors import ConfigError

_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of each tensor found in range: its version then, and N


def mark_in_range(indices: Tensor, num_experts: int) -> None:
    """Remember that all ``indices`` are in 0..num_experts - 1, until they are written to."""
    if not torch.compiler.is_compiling():
        _found[indices] = (_version(indices), num_experts)


def check_range(indices: Tensor, num_experts: int) -> None:
    """Refuse indices out of range.

    While a CUDA graph is captured nothing can be looked at.

    Raises:
        ConfigError: some are not in 0..num_experts - 1.
    """
    if not indices.numel() or _found.get(indices) == (_version(indices), num_experts):
        return
    if indices.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= num_experts:
        raise ConfigError(range_message(low, high, num_experts))
    mark_in_range(indices, num_experts)


def range_message(low: int, high: int, num_experts: int) -> str:
    """What is wrong with indices from ``low`` to ``high``."""
    return f"indices hold {low}..{high}, num_experts={num_experts}: give 0 to {num_experts - 1}"


def _version(indices: Tensor) -> int:
    return -1 if indices.is_inference() else indices._version
