"""The processes that share a data job, and how one's answer reaches all of them.

A data job (statistics, synthetic years, verification) divides its rows by ``rank`` and ``world`` and now and then puts
the parts together with ``gather``. Which launcher started the processes does not matter: under mpirun they speak MPI, and
torch is not imported; under srun, torchrun or submitit they speak gloo; a process that is alone speaks to nobody. A rank
that gives no sign of life for SMOE_TIMEOUT seconds ends the job on gloo; under mpirun that is mpirun's to notice.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, TypeVar

from smoe_hpc.launch.mpi import abandon, mpi_world
from smoe_hpc.launch.ranks import Ranks, find_ranks

T = TypeVar("T")
_MPI = ("openmpi", "pmi")


class ProcessCommunicator:
    """This process among those of a data job; the communicator of one as it stands. Use as a context manager.

    Attributes:
        rank: number of this process, 0 <= rank < world.
        world: number of processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.world = ranks.world

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank (collective). Values must be picklable."""
        return [value]

    def close(self, failed: bool = False) -> None:
        """Leave the others; to be called on every rank.

        Args:
            failed: whether this process leaves because of an error: it then waits for nobody.
        """

    def __enter__(self) -> ProcessCommunicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close(failed=kind is not None)


class _MpiCommunicator(ProcessCommunicator):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._world: Any = mpi_world(ranks)

    def gather(self, value: T) -> list[T]:
        gathered: list[T] = self._world.allgather(value)
        return gathered

    def close(self, failed: bool = False) -> None:
        if failed and self.world > 1:
            abandon()


class _GlooCommunicator(ProcessCommunicator):
    def __init__(self, ranks: Ranks) -> None:
        from smoe_hpc.launch import rendezvous  # brings torch, which the others do without

        super().__init__(ranks)
        self._group, self._leave = rendezvous.gloo_group(ranks)
        self._pulse = rendezvous.own_pulse

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        pulse = self._pulse()
        if pulse is not None:
            pulse.meet()  # a rank may have hours more to do than another, and is waited for while it gives signs of life
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def close(self, failed: bool = False) -> None:
        self._leave()


def find_communicator() -> ProcessCommunicator:
    """The communicator of this process, as its launcher says; collective over the job's processes.

    Raises:
        LaunchError: processes that do not fit together.
    """
    ranks = find_ranks(os.environ)
    if ranks.world == 1:
        return ProcessCommunicator(ranks)
    return _MpiCommunicator(ranks) if ranks.launcher in _MPI else _GlooCommunicator(ranks)
