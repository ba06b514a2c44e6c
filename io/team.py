"""Who shares a piece of work on data: the processes of an MPI or Slurm job, or one process alone.

Work is cut by what there is to do and never by who does it, so that a result does not depend on the number of ranks.

Dimensions: R ranks of a team.
"""

from __future__ import annotations

from typing import Any, Protocol


class Team(Protocol):
    """R processes that do the same work together. ``gather`` is collective: every rank calls it, in the same order."""

    @property
    def rank(self) -> int:
        """Which of the R this process is, from 0."""

    @property
    def world(self) -> int:
        """R."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""


class _Solo:
    """The team of one."""

    rank = 0
    world = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


SOLO: Team = _Solo()


def share(count: int, team: Team) -> range:
    """This rank's stretch of ``count`` things; the stretches of all ranks are the whole, in order.

    >>> share(5, SOLO)
    range(0, 5)
    """
    return range(count * team.rank // team.world, count * (team.rank + 1) // team.world)
