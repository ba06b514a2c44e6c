"""How processes start and find each other, and what the machine offers. This room knows no model.

Beside the Python modules stand the scripts that a person starts: ``quickstart.sh``, ``test.sh`` and ``local_slurm.sh``, and
``environment.sh``, which all of them read. `submit` and `Job` are names of `smoe_hpc.jobs`, which is imported at their
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smoe_hpc.jobs import Job, submit

__all__ = ["Job", "submit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from smoe_hpc import jobs

    return getattr(jobs, name)
