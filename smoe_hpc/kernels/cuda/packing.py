"""Weights as the CUDA kernels read them: bindings of ``pack.cu``.

Dimensions: N experts, F filters per expert, C input channels, k kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.library import call
from smoe_hpc.kernels.cuda.task import TYPES


def padded_channels(channels: int) -> int:
    """Channels of a packed row: rounded up to 8, so that 16-bit rows are whole pieces of 16 bytes."""
    return -(-channels // 8) * 8


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, F, C, k, k] as [N F, k k, C rounded up to 8] of another type, zero beyond C."""
    experts, filters, channels, size, _ = weight.shape
    weight = weight.contiguous()
    rows, taps, padded = experts * filters, size * size, padded_channels(channels)
    packed = torch.empty(rows, taps, padded, dtype=dtype, device=weight.device)
    call("smoe_pack_weight", weight, TYPES[weight.dtype], packed, TYPES[dtype], rows, channels, taps, padded)
    return packed


def unpack_gradient(packed: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """packed [N F, k k, C rounded up to 8] float32 as a gradient of ``shape`` [N, F, C, k, k]."""
    rows, taps, padded = packed.shape
    gradient = torch.empty(shape, dtype=dtype, device=packed.device)
    call("smoe_unpack_gradient", packed, gradient, TYPES[dtype], rows, shape[2], taps, padded)
    return gradient
