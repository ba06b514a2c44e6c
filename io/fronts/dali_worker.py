"""What DALI's worker processes run: read one batch as it is stored, nothing else.

A worker is told in two ways what to read. What never changes (the table of rows) it gets when it starts, pickled. What
changes from epoch to epoch, the batches of items, lies in a file that every worker looks at (`Schedule`): DALI numbers the
batches it asks for through its whole life, and a schedule says which of them are whose. So one set of processes serves all
epochs, and an epoch may be left at any step. Neither torch nor DALI is imported here.

Dimensions: B samples of a batch.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import traceback
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.errors import SmoeError
from smoe_hpc.io.reading import FrameTable, Reader

QUIET_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""A batch system sends them to every process of a job; what follows from them is the training process's to say."""
READ, IDLE, REFUSED, BROKEN = 0, 1, 2, 3
"""What became of a request: first number of its header. Then the schedule's number, the batch's, and the layout or text."""
PREFIX = 3


class Schedule:
    """Which batches are wanted, in a folder that the training process and its workers share.

    ``current`` holds the number of the schedule in force; ``<number>.npy`` its batches [batches + 1, B] int64, the first
    row being filled with the number that DALI gives to the first of them.

    Args:
        folder: of these files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, -1
        self.first = 0
        self.batches = np.zeros((0, 1), dtype=np.int64)
        self._current: np.ndarray | None = None

    def announce(self, first: int, batches: np.ndarray) -> int:
        """Put batches [batches, B] in force, to be asked for as ``first`` and on; the schedule's number."""
        number = self.number + 1
        np.save(self.folder / f"{number}.npy", np.concatenate([np.full((1, batches.shape[1]), first), batches]))
        if self._current is None:
            self._current = np.memmap(self.folder / "current", dtype=np.int64, mode="w+", shape=(1,))
        self._current[0] = number  # one aligned word: seen whole or not at all
        (self.folder / f"{number - 1}.npy").unlink(missing_ok=True)
        self.number = number
        return number

    def follow(self) -> None:
        """Take up the schedule in force, if it is another than the one known."""
        if self._current is None:
            self._current = np.memmap(self.folder / "current", dtype=np.int64, mode="r", shape=(1,))
        while (number := int(self._current[0])) != self.number:
            try:
                content = np.load(self.folder / f"{number}.npy")
            except FileNotFoundError:  # another has followed it meanwhile
                continue
            self.number, self.first, self.batches = number, int(content[0, 0]), content[1:]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "number": -1, "_current": None}


class Source:
    """Called by DALI in a worker with the number of a batch; gives its header, fields and targets.

    Args:
        table: what to read.
        verify: as `Reader` has it.
        schedule: which batches are wanted.
    """

    def __init__(self, table: FrameTable, verify: str, schedule: Schedule) -> None:
        self._table, self._verify, self._schedule = table, verify, schedule
        self._reader: Reader | None = None
        self._spare: dict[str, list[np.ndarray]] = {"inputs": [], "targets": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch_parent(self._schedule.folder)

    def __call__(self, info: Any) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """The batch with DALI's number ``info.iteration``, each part a list of the one array that DALI calls a sample."""
        self._schedule.follow()
        batch = info.iteration - self._schedule.first
        state, rest = IDLE, np.zeros(0, dtype=np.int64)
        frames, targets = self._memory("inputs", 0), self._memory("targets", 0)
        if 0 <= batch < len(self._schedule.batches):
            try:
                need = self._table.need(self._schedule.batches[batch])
                frames, targets = self._memory("inputs", len(need.rows)), self._memory("targets", len(need.target_rows))
                if self._reader is None:
                    self._reader = Reader(self._table, 1, self._verify)
                self._reader.read(need, frames, targets)
                state, rest = READ, need.header
            except SmoeError as error:
                state, rest = REFUSED, _as_numbers(str(error))
            except Exception:
                state, rest = BROKEN, _as_numbers(traceback.format_exc())
        header = np.concatenate([np.array([state, self._schedule.number, batch], dtype=np.int64), rest])
        return [header], [frames], [targets]

    def _memory(self, part: str, count: int) -> np.ndarray:
        """[count, channels, H, W] of the stored type, from memory that DALI has done with."""
        table, spare = self._table, self._spare[part]
        channels = table.input_channels if part == "inputs" else table.target_channels
        whole = next((array for array in spare if len(array) >= count), None)
        if whole is None:
            spare.clear()  # all too small
            whole = np.empty((count, len(channels), *table.store.grid.shape), dtype=table.store.encoding.stored_type)
        else:
            spare[:] = [array for array in spare if array is not whole]
        view = whole[:count]
        weakref.finalize(view, spare.append, whole).atexit = False  # DALI copies it in a thread of its own, some time later
        return view


def _as_numbers(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def as_text(numbers: np.ndarray) -> str:
    """The text of a header that tells of an error."""
    return numbers.astype(np.uint8).tobytes().decode()


def watch_parent(folder: Path) -> None:
    """End this process when the one that started it ends or asks it to, and at no other signal.

    The signals in `QUIET_SIGNALS` are blocked from the start (whoever starts the process sees to that), so that none is
    lost or acted on by chance; a thread takes them. SIGTERM from the parent ends the process, as DALI's pool expects.

    Args:
        folder: removed when the parent has gone without doing so.
    """
    parent = os.getppid()

    def watch() -> None:
        while True:
            told = signal.sigtimedwait(QUIET_SIGNALS, 1.0)
            if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == parent:
                os._exit(0)
            if os.getppid() != parent:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)

    threading.Thread(target=watch, name="smoe-watch-parent", daemon=True).start()
