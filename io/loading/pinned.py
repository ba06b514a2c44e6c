"""Page-locked memory of exactly the size that is asked for.

A GPU copies from it while the processor goes on. torch's own pool of it rounds up to powers of two, which for batches of
some hundred megabytes wastes as many.
"""

from __future__ import annotations

import math
import mmap
import weakref

import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes below which torch's pool wastes nothing worth speaking of


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-locked tensor of the CPU, given back with the last reference to it.

    Raises:
        RuntimeError: the system does not lock that much memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    pages = _Pages(-1, size)
    tensor = torch.frombuffer(pages, dtype=dtype)
    address = tensor.data_ptr()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    # The tensor's storage holds the pages, so they outlive every view of it.
    weakref.finalize(pages, _unlock, address).atexit = False
    return tensor.view(shape)


class _Pages(mmap.mmap):
    """Anonymous memory that says when it goes."""


def _unlock(address: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
