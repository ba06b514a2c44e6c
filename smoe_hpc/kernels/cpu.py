"""The compiled CPU kernels of the expert convolution: bindings of ``csrc/cpu``.

They run on the threads of the OpenMP library that torch has loaded, as many as torch uses. In a child that was forked
after the first call they run on one thread, since OpenMP's threads do not survive a fork.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.kernels.build import libraries
from smoe_hpc.kernels.build.loading import load_or_warn
from smoe_hpc.kernels.padding import PADDINGS
from smoe_hpc.kernels.ranges import check_indices, range_message

_OUT_OF_RANGE = 1  # enum Status of common.h, whose other value says that there is no memory
_TYPES = {torch.float32: 0, torch.float64: 1}
_SIZES: list[Any] = [ctypes.c_int] * 2 + [ctypes.c_int64] * 9 + [ctypes.c_int, ctypes.c_void_p]
_MAP: list[Any] = [ctypes.c_void_p] + [ctypes.c_int64] * 4


def serves(x: Tensor) -> bool:
    """Whether compiled kernels run on this tensor; the first call may compile them."""
    return x.device.type == "cpu" and libraries.native() and _library() is not None


def forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str, y: Tensor) -> None:
    """Fill y [B, K F, H, W], of the dtype of x [B, C, H, W]; with zeros where one of the sizes is 0.

    Raises:
        ConfigError: indices out of range, or a tensor whose storage was freed.
        RunError: no memory.
    """
    x, weight, indices = _in_memory(x, "input"), _in_memory(weight, "weights"), _in_memory(indices, "indices")
    if _is_empty(x, weight, indices):
        y.zero_()
        return
    x, weight, indices, out = _wide(x), _wide_weight(weight, x), _numbers(indices), _wide_like(y)
    sizes = _sizes(x, weight, indices, padding)
    status = _library().smoe_cpu_forward(*sizes, *_map(x), weight.data_ptr(), *_map(out))
    if status:
        _refuse(status, indices, weight)
    if out is not y:
        y.copy_(out)


def backward(g: Tensor, x: Tensor, weight: Tensor, indices: Tensor, padding: str, dx: Tensor | None, dw: Tensor | None) -> None:
    """Fill dx [B, C, H, W] and dw [N, F, C, k, k] (contiguous), where given, from g [B, K F, H, W]; with zeros where one
    of the sizes is 0.

    Raises:
        ConfigError: indices out of range, or a tensor whose storage was freed.
        RunError: no memory.
    """
    g, x = _in_memory(g, "gradient"), _in_memory(x, "input")
    weight, indices = _in_memory(weight, "weights"), _in_memory(indices, "indices")
    if _is_empty(x, weight, indices):
        for wanted in (dx, dw):
            if wanted is not None:
                wanted.zero_()
        return
    g, values, wide_weight, indices = _wide(g), _wide(x), _wide_weight(weight, x), _numbers(indices)
    to_x = None if dx is None else _wide_like(dx)
    to_weight = None if dw is None else _wide_like(dw)
    status = _library().smoe_cpu_backward(
        *_sizes(values, wide_weight, indices, padding),
        *_map(g),
        *_map(values),
        wide_weight.data_ptr(),
        *((None, 0, 0, 0, 0) if to_x is None else _map(to_x)),
        None if to_weight is None else to_weight.data_ptr(),
    )
    if status:
        _refuse(status, indices, weight)
    for wanted, filled in ((dx, to_x), (dw, to_weight)):
        if wanted is not None and filled is not None and wanted is not filled:
            wanted.copy_(filled)


def _in_memory(tensor: Tensor, what: str) -> Tensor:
    """The tensor with its sign written out, which torch may only have noted; refused where it has no memory."""
    if tensor.data_ptr() == 0 and tensor.numel():
        raise ConfigError(
            f"{what} {list(tensor.shape)} has no memory: its storage was freed, or it stands for zeros that torch has not "
            "written; give a tensor that holds its numbers"
        )
    return tensor.resolve_neg()


def _is_empty(x: Tensor, weight: Tensor, indices: Tensor) -> bool:
    """Whether there is nothing to compute; the kernels divide by their sizes and are not called then."""
    if x.numel() and weight.numel() and indices.numel():
        return False
    check_indices(indices, weight.shape[0])
    return True


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _TYPES else tensor.float()


def _wide_like(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _TYPES else torch.empty_like(tensor, dtype=torch.float32)


def _wide_weight(weight: Tensor, x: Tensor) -> Tensor:
    """Contiguous, rounded to the type of x."""
    return _wide(weight if weight.dtype == x.dtype else weight.to(x.dtype)).contiguous()


def _numbers(indices: Tensor) -> Tensor:
    return indices.to(torch.int64).contiguous()


def _sizes(x: Tensor, weight: Tensor, indices: Tensor, padding: str) -> tuple[Any, ...]:
    num_experts, filters, _, size, _ = weight.shape
    choices = indices.shape[0] if indices.dim() == 4 else 1
    selected = indices.shape[-3]
    threads = torch.get_num_threads()
    of_x = _TYPES[x.dtype], threads, *x.shape
    return *of_x, num_experts, selected, filters, size, choices, PADDINGS.index(padding), indices.data_ptr()


def _map(tensor: Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.stride()


def _refuse(status: int, indices: Tensor, weight: Tensor) -> None:
    if status == _OUT_OF_RANGE:
        low, high = (int(bound) for bound in indices.aminmax())
        raise ConfigError(range_message(low, high, weight.shape[0]))
    raise RunError("the expert convolution cannot allocate its workspace; use a smaller batch")


@functools.cache
def _library() -> Any:
    path = libraries.cpu_library()
    if path is None:
        return None
    library = load_or_warn("CPU", path)
    if library is None:
        return None
    library.smoe_cpu_forward.argtypes = [*_SIZES, *_MAP, ctypes.c_void_p, *_MAP]
    library.smoe_cpu_backward.argtypes = [*_SIZES, *_MAP, *_MAP, ctypes.c_void_p, *_MAP, ctypes.c_void_p]
    library.smoe_cpu_use_threads.argtypes = [ctypes.c_void_p]
    library.smoe_cpu_use_threads(openmp())
    os.register_at_fork(after_in_child=lambda: library.smoe_cpu_use_threads(None))
    return library


def openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded; None where it has none."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line.rpartition("/")[2]}
    for path in sorted(loaded):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
