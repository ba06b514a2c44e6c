"""Signs of life: which of a job's processes are alive, and where is each?

A thread of every process writes a rising number and what the process is doing into the store through which they met, every
two seconds, over a connection of its own. A process that waits in vain looks there who is missing: the number of one that
was stopped or killed stands still, that of one that is merely slow goes on. Nothing waits for these threads.

Dimensions: R ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.patience import VARIABLE, Patience

T = TypeVar("T")
_ANSWER = 10.0  # seconds, at most, in which a store that lives answers
_STATUS = 2


class StoreSilent(Exception):
    """The store does not answer: the process that holds it was stopped, or has ended.

    Args:
        ended: whether its connection is closed.
    """

    def __init__(self, ended: bool) -> None:
        super().__init__("ended" if ended else "silent")
        self.ended = ended


class Pulse:
    """This process's signs of life, and what the others' tell; one a process, from the start of a group to its end.

    Args:
        store: torch's store, over a connection that nothing else uses.
        served: what serves the store, where this process does; kept as long as this.
        rank: of this process.
        world: R.
        holder: who holds the store, in words: "rank 0" or the launcher.
        allowed: how long to wait.
        watch: whether the thread itself ends this process where a collective takes too long: on a GPU nothing else can.
    """

    def __init__(self, store: Any, served: Any, rank: int, world: int, holder: str, allowed: Patience, *, watch: bool) -> None:
        self.allowed = allowed
        self._served = served
        self._silent: StoreSilent | None = None
        self.step: int | None = None
        self._store, self._rank, self._world, self._holder, self._watch = store, rank, world, holder, watch
        self._collective: tuple[str, float] = ("", 0.0)
        self._meetings = itertools.count()  # every rank comes to all of them
        self._over = threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._beat, name="smoe-pulse", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Say that this process is in a collective, e.g. "all_reduce (gradients)"; of nested names the outer one counts."""
        if self._collective[0]:
            yield
            return
        self._collective = (what, time.monotonic())
        yield
        self._collective = ("", 0.0)  # after an error it stays, which tells where

    def where(self) -> str:
        """The collective that this process is in, or its step: "all_reduce (gradients) of step 7"."""
        step = "" if self.step is None else f"step {self.step}"
        what = self._collective[0]
        return f"{what} of {step}" if what and step else what or step

    def meet(self) -> None:
        """Wait until every rank is here, as long as those who are not give signs of life (collective).

        Raises:
            LaunchError: one gives none; it names the rank.
        """
        key = f"meeting/{next(self._meetings)}"
        seen: dict[int, tuple[str, float]] = {}
        try:
            if self.query(lambda store: store.add(f"{key}/here", 1)) == self._world:
                self.query(lambda store: store.set(key, ""))
            pause, looked = 0.01, time.monotonic()
            while not self.query(lambda store: store.check([key])):
                time.sleep(pause)
                pause, now = min(2 * pause, 0.5), time.monotonic()
                if now - looked < self.allowed.beat:
                    continue
                looked = now
                for rank, pulse in enumerate(self._pulses()):
                    if rank not in seen or seen[rank][0] != pulse:
                        seen[rank] = (pulse, now)
                silent = [rank for rank, (_, since) in seen.items() if now - since > self.allowed.wait]
                if silent:
                    raise LaunchError(f"{_named(silent)} has given no sign of life for {self.allowed.wait:g} s: {_STOPPED}")
        except StoreSilent as error:
            raise LaunchError(self._of_holder(error)) from None

    def missing(self, broken: bool) -> str:
        """Which rank did not come to where this process waited, and how it fares, in words; takes seconds.

        Args:
            broken: whether a connection was closed, so that somebody has ended; else the time was over.
        """
        at = self.where() or "a collective"
        late = "" if broken else f" did not come to {at} within {self.allowed.wait:g} s"
        try:
            before = self._pulses()
            time.sleep(3 * self.allowed.beat + 0.5)
            after = self._pulses()
        except StoreSilent as error:
            return f"{self._of_holder(error)}; rank {self._rank} waited in {at}"
        others = [rank for rank in range(self._world) if rank != self._rank]
        silent = [rank for rank in others if before[rank] == after[rank]]
        if silent and broken:
            return f"{_named(silent)} ended without a word (killed, perhaps for want of memory?); the others were at {at}"
        if silent:
            return f"{_named(silent)}{late} and gives no sign of life ({_STOPPED}); the others waited there"
        if broken:
            return f"the connection between processes broke at {at}, though all of them live; look at the network"
        whereabouts = {rank: after[rank].partition(" ")[2] for rank in others}
        elsewhere = [rank for rank in others if whereabouts[rank] != self.where()]
        if elsewhere:
            location = whereabouts[elsewhere[0]] or "its start"
            remedy = f"set {VARIABLE} to more seconds if that may take longer"
            return f"{_named(elsewhere)}{late}: it lives, and is at {location}; {remedy}"
        return f"{at} did not end within {self.allowed.wait:g} s, though all processes came to it; look at the network"

    def query(self, question: Callable[[Any], T]) -> T:
        """An answer of the store, in limited time.

        Raises:
            StoreSilent: there is none.
        """
        if self._silent is not None:  # once is enough: each question would wait again
            raise self._silent
        answer: list[T] = []
        ended = threading.Event()

        def run() -> None:
            try:
                answer.append(question(self._store))
            except RuntimeError:
                ended.set()

        asking = threading.Thread(target=run, daemon=True)  # torch's own time-outs do not cover every call
        asking.start()
        asking.join(min(_ANSWER, self.allowed.wait / 2))
        if not answer:
            self._silent = StoreSilent(ended=ended.is_set())
            raise self._silent
        return answer[0]

    def end(self) -> None:
        """Give no more signs."""
        self._over.set()
        self._thread.join(2 * self.allowed.beat)

    def _pulses(self) -> list[str]:
        return [
            pulse.decode() for pulse in self.query(lambda store: store.multi_get([f"pulse/{r}" for r in range(self._world)]))
        ]

    def _write(self, number: int) -> None:
        self._store.set(f"pulse/{self._rank}", f"{number} {self.where()}")

    def _beat(self) -> None:
        for number in itertools.count(1):
            if self._over.wait(self.allowed.beat):
                return
            with contextlib.suppress(RuntimeError):  # the store has gone: the main thread will hear of it
                self._write(number)
            what, since = self._collective
            if self._watch and what and time.monotonic() - since > self.allowed.wait + 4 * self.allowed.beat:
                self._leave()

    def _leave(self) -> None:
        """End this process, whose main thread waits for a GPU that waits for another process."""
        sys.stderr.write(f"error (rank {self._rank}): {self.missing(broken=False)}\n")
        sys.stderr.flush()
        os._exit(_STATUS)

    def _of_holder(self, error: StoreSilent) -> str:
        if error.ended:
            return f"{self._holder} ended without a word (killed, perhaps for want of memory?)"
        return f"{self._holder} gives no sign of life ({_STOPPED})"


_STOPPED = "stopped, or its node is gone"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown}{more}"
