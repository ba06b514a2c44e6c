"""Teams for tests: ranks as threads of this process, so that what each of them gets can be compared."""

import threading
from collections.abc import Callable
from typing import Any


class ThreadCommunicator:
    """One rank of a communicator of threads."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world = rank, world
        self._barrier, self._slots = barrier, slots

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(60)
        everybody = list(self._slots)
        self._barrier.wait(60)
        return everybody


def on_threads(world: int, work: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """What ``work(communicator)`` returns, or the error it raises, on each rank."""
    barrier, slots = threading.Barrier(world), [None] * world
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCommunicator(rank, world, barrier, slots))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
