"""The loader section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smoe_hpc.config import rules


@dataclass(frozen=True)
class Loader:
    """How samples come into memory. It changes no result: two runs that differ in it alone are the same experiment.

    Attributes:
        backend: "threads", "dali" (NVIDIA DALI) or "auto": dali where it is installed and has the shared memory that it
            needs (/dev/shm), threads elsewhere.
        workers: threads or processes that read and make batches, for each process of the run; at least 1.
        prefetch: batches made ahead, at least 1.
        verify: verify checksums while reading: "off", "sampled" (a fixed 1 in 64 of the fields) or "all".
    """

    backend: Literal["threads", "dali", "auto"] = "threads"
    workers: int = 1
    prefetch: int = 2
    verify: Literal["off", "sampled", "all"] = "off"

    def __post_init__(self) -> None:
        _check_loader(self)


def _check_loader(loader: Loader) -> None:
    """Counts of a Loader section."""
    rules.check_choices(loader, "loader.")
    rules.check_count("loader.workers", loader.workers, 2)
    rules.check_count("loader.prefetch", loader.prefetch, 2)
