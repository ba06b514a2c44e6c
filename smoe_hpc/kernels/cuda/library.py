"""The compiled CUDA library: loaded for the device that is there, and called with tensors.

An entry point is ``extern "C" int smoe_<name>(...)``, whose last parameter is the stream; it returns 0, a cudaError_t, or
UNSUPPORTED, and is declared in ``csrc/cuda``. The structures here mirror those of ``common.cuh``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.compat import cuda_device, cuda_stream
from smoe_hpc.errors import RunError
from smoe_hpc.kernels.build import libraries
from smoe_hpc.kernels.build.loading import load_or_warn

_UNSUPPORTED = -1  # enum Status of common.cuh
_BYREF = type(ctypes.byref(ctypes.c_int()))


class Unsupported(Exception):
    """The kernel does not support these sizes or types, or this GPU; another form has to be used."""


class Shape(ctypes.Structure):
    """``smoe::Shape``: a convolution's sizes."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("B", "C", "Hi", "Wi", "Ho", "Wo", "N", "K", "F", "ksize", "off", "wrap"))


class Windows(ctypes.Structure):
    """``smoe::Windows``: what the pixels of each window select. The tensors must outlive the call."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("counts", "ids", "masks", "slots")),
        *((name, ctypes.c_int) for name in ("tiles_y", "tiles_x", "step_h", "step_w", "first", "rows", "columns", "cap")),
    )


class Tile(ctypes.Structure):
    """``smoe::Tile``: 128 rows of a matrix."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("rows", "columns", "batch"))


def make_windows(counts: Tensor, experts: Tensor, masks: Tensor | None, slots: Tensor, *sizes: int) -> Windows:
    """Windows of these tensors; ``sizes`` are tiles_y, tiles_x, step_h, step_w, first, rows, columns, cap."""
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (counts, experts, masks, slots))
    return Windows(*pointers, *sizes)


_libraries: dict[int, ctypes.CDLL | None] = {}  # of each device's number
_functions: dict[tuple[int, str], Any] = {}


@torch.compiler.assume_constant_result
def available(device: torch.device | int) -> bool:
    """Whether compiled kernels are enabled and run on this device; the first call for a device may compile them."""
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return False
        device = torch.cuda.current_device() if device.index is None else device.index
    return libraries.native() and _library(device) is not None


def _library(device: int) -> ctypes.CDLL | None:
    if device not in _libraries:
        _libraries[device] = _load(device)
    return _libraries[device]


def _load(device: int) -> ctypes.CDLL | None:
    major, minor = torch.cuda.get_device_capability(device)
    path = libraries.cuda_library(10 * major + minor)
    if path is None:
        return None
    library = load_or_warn("CUDA", path)
    if library is None:
        return None
    library.smoe_error_string.restype = ctypes.c_char_p
    return library


def call(name: str, *args: Any) -> None:
    """Launch an entry point on the current stream of the device of the first tensor.

    Args:
        name: as in the source, ``smoe_...``.
        args: tensors and None become pointers, int and bool whole numbers of either width, float a C ``double``; a ctypes
            structure is passed by value, one in ``ctypes.byref`` as a pointer, and any other ctypes object as what it
            is. An argument in one place has one kind in every call.

    Raises:
        Unsupported: the kernel does not do this, or is not for this GPU.
        RunError: CUDA reports an error.
    """
    values = []
    device = -1
    for arg in args:
        if isinstance(arg, Tensor):
            if device < 0:
                device = arg.get_device()
            values.append(arg.data_ptr())
        else:
            values.append(arg)
    if device < 0:
        device = torch.cuda.current_device()
    function = _functions.get((device, name)) or _find(device, name, args)
    stream = cuda_stream(device)
    if device == cuda_device():
        status = function(*values, stream)
    else:
        with torch.cuda.device(device):
            status = function(*values, stream)
    if status:
        _refuse(device, name, status)


def capture_of(device: torch.device) -> int:
    """The number of the CUDA graph capture that the device's current stream takes part in; 0 if it is in none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    number = ctypes.c_ulonglong()
    with torch.cuda.device(device):
        call("smoe_capture", ctypes.byref(number))
    return number.value


def _find(device: int, name: str, args: tuple[Any, ...]) -> Callable[..., int]:
    library = _library(device)
    if library is None:
        raise Unsupported(f"no compiled kernels for device {device}")
    try:
        function = getattr(library, name)
    except AttributeError:
        raise Unsupported(f"the library for device {device} has no {name}") from None
    function.restype = ctypes.c_int
    function.argtypes = [*map(_type_of, args), ctypes.c_void_p]
    _functions[device, name] = function
    return function


def _type_of(arg: Any) -> Any:
    if arg is None or isinstance(arg, (Tensor, _BYREF)):
        return ctypes.c_void_p
    if isinstance(arg, float):
        return ctypes.c_double
    if isinstance(arg, int):
        return ctypes.c_int64  # a callee that wants an int reads its lower half, as the calling conventions have it
    return type(arg)


def _refuse(device: int, name: str, status: int) -> None:
    if status == _UNSUPPORTED:
        raise Unsupported(f"{name} does not support these sizes or types")
    library = _library(device)
    assert library is not None
    text = library.smoe_error_string(status).decode()
    raise RunError(f"CUDA kernel {name} on device {device}: {text} ({status})")
