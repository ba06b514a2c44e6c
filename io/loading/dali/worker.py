"""What DALI's worker processes run: read a piece of a batch as it is stored, nothing else.

A worker learns in two ways what to read. What never changes (the table of rows) it gets when it starts, pickled. What
changes from epoch to epoch, the batches of ids, lies in a file that every worker looks at (`Schedule`): DALI numbers the
batches it asks for through its whole life, and a schedule says which of them are whose. So one set of processes serves all
epochs, and an epoch may be left at any step. Neither torch nor DALI is imported here.

Dimensions: B samples of a batch, U and V input and target fields read for it, P pieces that these are cut into.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from smoe_hpc.errors import SmoeError
from smoe_hpc.io.loading.frames import FrameTable, read_frames

QUIET_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""A batch system sends them to every process of a job; what follows from them is the training process's to say."""
READ, IDLE, REFUSED, BROKEN = 0, 1, 2, 3
"""What became of a request: the first number of its answer. Then the schedule's number and the batch's; then the text of an
error, or in the first piece the packed plan of the batch."""
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
    """Called by DALI in a worker with the numbers of a batch and of a piece; gives the piece's answer, fields and targets.

    Every piece has the same number of fields, ceil(U / P) and ceil(V / P), so that DALI can lay them end to end; what the
    last ones have beyond the fields of the batch means nothing.

    Args:
        table: what to read.
        verify: as `read_frames` has it.
        schedule: which batches are wanted.
        pieces: P.
        depth: batches that DALI asks for ahead.
    """

    def __init__(self, table: FrameTable, verify: str, schedule: Schedule, pieces: int, depth: int) -> None:
        self._table, self._verify, self._schedule = table, verify, schedule
        self._pieces, self._depth = pieces, depth
        self._inputs = LentMemory(table, table.input_channels, depth)
        self._targets = LentMemory(table, table.target_channels, depth)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch_parent(self._schedule.folder)

    def __call__(self, info: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Piece ``info.idx_in_batch`` of the batch with DALI's number ``info.iteration``."""
        self._schedule.follow()
        batch = info.iteration - self._schedule.first
        state, rest = IDLE, np.zeros(0, dtype=np.int64)
        frames, targets = self._inputs.nothing, self._targets.nothing
        if 0 <= batch < len(self._schedule.batches):
            try:
                frames, targets, rest = self._read(self._schedule.batches[batch], info.idx_in_batch, info.iteration)
                state = READ
            except SmoeError as error:
                state, rest = REFUSED, _as_numbers(str(error))
            except Exception:  # the training process raises it: here it would only end in a log of DALI's
                state, rest = BROKEN, _as_numbers(traceback.format_exc())
        return np.concatenate([np.array([state, self._schedule.number, batch], dtype=np.int64), rest]), frames, targets

    def _read(self, ids: np.ndarray, piece: int, request: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fields, targets and the rest of the answer for one piece of the batch of ids [B]."""
        table, plan = self._table, self._table.plan(ids)
        rows, each = _piece(plan.rows, piece, self._pieces)
        target_rows, each_target = _piece(plan.target_rows, piece, self._pieces)
        frames = self._inputs.take(each, -(-len(ids) * table.inputs_each // self._pieces), request)
        targets = self._targets.take(each_target, -(-len(ids) * table.targets_each // self._pieces), request)
        read_frames(table, (rows, target_rows), (frames[: len(rows)], targets[: len(target_rows)]), self._verify)
        return frames, targets, plan.pack() if piece == 0 else np.zeros(0, dtype=np.int64)


def _piece(rows: np.ndarray, piece: int, pieces: int) -> tuple[np.ndarray, int]:
    """The rows of one of even pieces, the last of which may be short or empty, and how many a full piece has.

    >>> [_piece(np.arange(5), piece, 4)[0].tolist() for piece in range(4)]
    [[0, 1], [2, 3], [4], []]
    """
    each = -(-len(rows) // pieces)
    return rows[each * piece : each * (piece + 1)], each


class LentMemory:
    """Memory of fields that is used again when DALI has done with it, which copies them some time after it got them.

    DALI never asks for a batch before it has all pieces of the one ``depth`` before it, so that what was lent for that is
    free. A worker that takes more than a piece of each batch has more memory for that time, and does not keep it.

    Args:
        table: what is read.
        channels: of each field.
        depth: batches that DALI asks for ahead.
    """

    def __init__(self, table: FrameTable, channels: list[str], depth: int) -> None:
        self._field = (len(channels), *table.store.grid.shape)
        self._type, self._depth = table.store.encoding.stored_type, depth
        self._lent: list[tuple[int, np.ndarray]] = []
        self._spare: list[np.ndarray] = []

    def __len__(self) -> int:
        """Arrays that are kept, those that are lent among them."""
        return len(self._lent) + len(self._spare)

    @property
    def nothing(self) -> np.ndarray:
        """[0, channels, H, W]."""
        return np.empty((0, *self._field), dtype=self._type)

    def take(self, count: int, most: int, request: int) -> np.ndarray:
        """[count, channels, H, W] for the batch that DALI numbers ``request``; ``most`` is the largest count to come."""
        self._spare += [whole for number, whole in self._lent if number <= request - self._depth]
        self._lent = [(number, whole) for number, whole in self._lent if number > request - self._depth]
        self._spare = [whole for whole in self._spare if len(whole) >= count]
        whole = self._spare.pop() if self._spare else np.empty((most, *self._field), dtype=self._type)
        self._lent.append((request, whole))
        del self._spare[max(self._depth - len(self._lent), 0) :]
        return whole[:count]


def _as_numbers(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def as_text(numbers: np.ndarray) -> str:
    """The text of an answer that tells of an error."""
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
