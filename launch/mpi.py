"""The MPI that started this process, held against what its launcher says."""

from __future__ import annotations

import atexit
import sys
from typing import Any

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.ranks import Ranks

_REMEDY = "install mpi4py and that MPI's library, or set MASTER_ADDR and MASTER_PORT"
_abandoned = False


def mpi_world(ranks: Ranks) -> Any:
    """MPI's world communicator (mpi4py); the first call starts MPI, collectively over the job's processes.

    MPI ends when the interpreter does, unless :func:`abandon` was called or somebody else had started it.

    Raises:
        LaunchError: mpi4py is missing, or uses another MPI than the one that started these processes.
    """
    ours = "mpi4py.MPI" not in sys.modules
    try:
        if ours:
            import mpi4py

            mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{ranks.launcher} started {ranks.world} processes, but its MPI cannot be used ({error}); {_REMEDY}"
        ) from error
    if ours:
        atexit.register(_finish)
    world = MPI.COMM_WORLD
    if world.size != ranks.world:
        library = MPI.Get_library_version().splitlines()[0].split(",")[0]
        raise LaunchError(
            f"{ranks.launcher} started {ranks.world} processes, but mpi4py uses {library} and sees {world.size}: "
            "mpirun belongs to another MPI; use the mpirun of that library, or set MASTER_ADDR and MASTER_PORT"
        )
    return world


def abandon() -> None:
    """Leave MPI without a farewell: this process failed, and mpirun is to end the others.

    MPI_Finalize would wait for ranks that wait for this one in a collective.
    """
    global _abandoned
    _abandoned = True


def _finish() -> None:
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized() and not _abandoned:
        MPI.Finalize()
