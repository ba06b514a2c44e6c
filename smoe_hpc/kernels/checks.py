"""Whether the arguments of an expert convolution go together: shapes, types and devices, never numbers.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.padding import check_padding

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def types_message(x: Tensor, weight: Tensor) -> str:
    """What is wrong with the types of input and weights that do not go together."""
    found = f"input is {x.dtype}, weights are {weight.dtype}"
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"{found}; give both as torch.float32, torch.float64, torch.bfloat16 or torch.float16"
    if torch.float64 in (x.dtype, weight.dtype):
        return f"{found}; convert one of them: torch.autocast leaves float64 alone"
    return f"{found}; convert one of them, or use torch.autocast"


def check_arguments(x: Tensor, weight: Tensor, indices: Tensor, padding: str) -> None:
    """Refuse arguments of an expert convolution that do not go together; ConfigError says which and why."""
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


def check_gradient(g: Tensor, x: Tensor, weight: Tensor, indices: Tensor) -> None:
    """Refuse a gradient that is not one of the output, for arguments that :func:`check_arguments` has found right."""
    _check_dense(("gradient", g))
    expected = [x.shape[0], indices.shape[-3] * weight.shape[1], *x.shape[2:]]
    if list(g.shape) != expected:
        raise ConfigError(f"gradient {list(g.shape)} does not fit the output {expected}; give one of its shape")
    if g.device != x.device:
        raise ConfigError(f"gradient is on {g.device}, input on {x.device}; move them to one device")
