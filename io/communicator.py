"""Who shares a piece of work on data: the processes of an MPI or Slurm job, or one process alone.

Work is cut by what there is to do and never by who does it, so that a result does not depend on the number of ranks.

Dimensions: R ranks of a communicator.
"""

from __future__ import annotations

from typing import Any, Protocol


class Communicator(Protocol):
    """R processes that do the same work together. ``gather`` is collective: every rank calls it, in the same order."""

    @property
    def rank(self) -> int:
        """Which of the R this process is, from 0."""

    @property
    def world(self) -> int:
        """R."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""


class _SingleProcess:
    """The communicator of one."""

    rank = 0
    world = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


SINGLE_PROCESS: Communicator = _SingleProcess()


def share(count: int, communicator: Communicator) -> range:
    """This rank's stretch of ``count`` things; the stretches of all ranks are the whole, in order.

    >>> share(5, SINGLE_PROCESS)
    range(0, 5)
    """
    return range(count * communicator.rank // communicator.world, count * (communicator.rank + 1) // communicator.world)
