"""Loading a compiled library: only one that is complete, and that no other user can have put there."""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.files.trust import trusted

_ENTRY = re.compile(rb'extern "C" [^;(]*?(smoe_\w+)\(')
T = TypeVar("T")


def is_whole(library: Path, sources: Iterable[Path]) -> bool:
    """Whether a library is there and names every entry point of its sources, as half a file does not.

    It is read, not loaded: there is no safe way to unload a library.
    """
    try:
        content = library.read_bytes()
    except OSError:
        return False
    names = {name for source in sources for name in _ENTRY.findall(source.read_bytes())}
    return all(name + b"\0" in content for name in names)


def load(library: Path) -> ctypes.CDLL:
    """The library in this process.

    Its owner and that of every folder above are checked first: if no other user owns or may write any of them, nobody can
    change the file between the check and the loading.

    Raises:
        RunError: it cannot be loaded: another user may have put it there, it is incomplete, or it lies in a folder
            that programs may not run from.
    """
    reason = trusted(library.parent) or trusted(library)
    if reason is not None:
        raise RunError(f"{library} is not loaded, since {reason}; delete it, or set SMOE_CACHE to a folder of your own")
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RunError(
            f"{library} cannot be loaded ({str(error).removeprefix(f'{library}: ')}); delete the file, so that it is compiled "
            "again, or set SMOE_CACHE to a folder whose file system lets programs run (no noexec)"
        ) from None


def load_or_warn(which: str, library: Path) -> ctypes.CDLL | None:
    """`load`; None, after a warning, where the library cannot be loaded."""
    return or_warn(which, lambda: load(library), "loaded")


def or_warn(which: str, get: Callable[[], T], done: str = "compiled") -> T | None:
    """The result of a function; None, after a warning, if it raises.

    Args:
        which: kernels, "CPU" or "CUDA".
        get: the function.
        done: what failed, for the warning.
    """
    try:
        return get()
    except (RunError, ConfigError, OSError) as error:
        warnings.warn(
            f"the {which} kernels cannot be {done}, the slower fallback in torch is used: {error}\n"
            "(`smoe-hpc kernels build` compiles them ahead; SMOE_KERNELS=torch selects the fallback)",
            stacklevel=4,
        )
        return None
