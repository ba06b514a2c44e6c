"""Keep freed memory in the process, so that a step on a CPU does not fetch the same pages anew for every tensor.

glibc returns the top of the heap to the kernel after a free of more than 128 KiB and maps tensors of some size directly;
a training step frees and takes half a megabyte dozens of times, and each time the kernel clears the pages again. On the
heat quickstart two thirds more steps a second were measured without that (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_TRIM = 2**31 - 1
_LARGEST_MMAP = 32 * 2**20  # glibc takes no more


def keep_freed_memory() -> bool:
    """Raise glibc's two thresholds as far as they go; True if it was done (False without glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl, macOS
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM))
