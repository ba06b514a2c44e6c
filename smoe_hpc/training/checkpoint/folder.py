"""The checkpoints of one run: saving, finding the newest that can be used, removing what is no longer kept."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import CheckpointError, SmoeError
from smoe_hpc.files import writing
from smoe_hpc.runs import layout
from smoe_hpc.training.checkpoint import manifest, shards
from smoe_hpc.training.checkpoint.manifest import OutdatedCheckpoint, Saved, read
from smoe_hpc.training.processes import Processes

_log = logging.getLogger(__name__)
_PARTIAL = ".partial_"
_STEP = re.compile(rf"{layout.STEP}(0|[1-9][0-9]*)")
_NOTE_BYTES = 1 << 16


class Checkpoints:
    """The checkpoints of one run.

    Beside the folder lies a note, ``<folder>.json``, of the newest step that was saved: it distinguishes a
    folder that has become empty (a lost mount) from one that never held anything.

    Args:
        folder: where ``step_N`` lie.
        processes: the ranks; `save` and `newest` are collective over them.
        keep: how many of the newest stay; the best stays besides.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int) -> None:
        self.folder = folder
        self._note = folder.with_name(f"{folder.name}.json")
        self._processes = processes
        self._keep = keep
        self._proven = False

    def clear_partial(self) -> None:
        """Remove what a killed process left half-written (rank 0, with the run locked)."""
        for name in _names(self.folder):
            if name.startswith(_PARTIAL):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first.

        Raises:
            CheckpointError: the folder is there and cannot be read.
        """
        return sorted(int(found[1]) for name in _names(self.folder) if (found := _STEP.fullmatch(name)))

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], identity: dict[str, str], best: int | None
    ) -> None:
        """Write ``step_<step>`` and remove what is no longer to be kept (collective).

        The first one that a process writes is read back, and held against what was to be written, before it counts.

        Args:
            step: optimiser steps done.
            tensors: whole tensors, equal on every rank; the ranks share the writing.
            state: plain JSON values.
            identity: see `Saved`; checked at load and when a run goes on.
            best: step of the best checkpoint, which stays.

        Raises:
            CheckpointError: it could not be written (disk full, ...); those before are untouched.
        """
        partial = self.folder / f"{_PARTIAL}{layout.STEP}{step}"
        try:
            shards.check_savable(tensors)
            self._processes.on_first(lambda: _renew(partial))
            plan = shards.assign({name: t.numel() * t.element_size() for name, t in tensors.items()}, self._processes.world)
            digests = self._write(partial, tensors, plan[self._processes.rank])
            placed = {name: file for own in plan for file, names in own.items() for name in names}
            self._processes.on_first(lambda: self._commit(partial, step, tensors, placed, state, identity, digests))
        except (OSError, RuntimeError, SmoeError) as error:
            if self._processes.first:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            remedy = f"step_{kept[-1]} is intact: " if kept else ""
            raise CheckpointError(
                f"checkpoint step_{step} was not written to {self.folder} ({_cause(error, self.folder, tensors)}); "
                f"{remedy}make room and start the same command again"
            ) from error
        if self._processes.first:
            self._prune(step, best)

    def _write(self, folder: Path, tensors: dict[str, Tensor], own: dict[str, list[str]]) -> dict[str, list[Any]]:
        """Write this rank's files; {file: [bytes, sha256]} of all ranks' (collective)."""

        def write() -> dict[str, list[Any]]:
            for name, names in own.items():
                shards.write(folder / name, {tensor: tensors[tensor] for tensor in names})
            return {name: list(writing.digest_of(folder / name)) for name in own}

        digests = self._processes.together(write)
        if self._processes.world == 1:
            return digests
        parts: list[dict[str, list[Any]]] = [{}] * self._processes.world
        torch.distributed.all_gather_object(parts, digests, group=self._processes.control)
        return {name: digest for part in parts for name, digest in part.items()}

    def _commit(
        self,
        partial: Path,
        step: int,
        tensors: dict[str, Tensor],
        placed: dict[str, str],
        state: dict[str, Any],
        identity: dict[str, str],
        digests: dict[str, list[Any]],
    ) -> None:
        kinds = {name: manifest.kind_of(tensor) for name, tensor in tensors.items()}
        manifest.write(partial, step, kinds, placed, digests, state, identity)
        if not self._proven:
            _prove(partial, tensors, state)
            self._proven = True
        final = self.folder / f"{layout.STEP}{step}"
        if final.exists():  # one that was found damaged, and whose step has been made again
            shutil.rmtree(final)
        os.rename(partial, final)
        writing.sync(self.folder)
        writing.write_json(self._note, {"newest": step})

    def _prune(self, newest: int, best: int | None) -> None:
        """Keep the newest and the best; those of later steps were passed over when the run went on, and are being remade."""
        steps = self.steps()
        older = [step for step in steps if step <= newest]
        later = steps[len(older) :]
        for step in [*older[: -self._keep], *later]:
            if step != best:
                shutil.rmtree(self.folder / f"{layout.STEP}{step}", ignore_errors=True)

    def newest(self, check: Callable[[Saved], None] = lambda saved: None) -> Saved | None:
        """The newest checkpoint that can be used, or None where none was ever made (collective).

        One that is damaged or unreadable is passed over, with a warning.

        Args:
            check: raises CheckpointError for an intact one that is unusable for another reason; runs on rank 0.

        Raises:
            CheckpointError: there are checkpoints and none can be used; or they, or their folder, cannot be read or are
                gone; or the newest is in the form of an earlier version.
        """
        return self._processes.on_first(lambda: self._newest(check))

    def _newest(self, check: Callable[[Saved], None]) -> Saved | None:
        problems = []
        for step in reversed(self.steps()):
            try:
                saved = self._whole(step)
                check(saved)
            except OutdatedCheckpoint:
                raise
            except CheckpointError as error:
                problems.append(str(error))
                _log.warning("%s; trying the one before", error)
            else:
                return saved
        if problems:
            raise CheckpointError(f"no whole checkpoint in {self.folder}: {problems[0]}; restore one, or remove the folder")
        self._refuse_lost()
        return None

    def _refuse_lost(self) -> None:
        """CheckpointError if the folder is empty but something was saved in it."""
        try:
            step = writing.read_json(self._note, _NOTE_BYTES)["newest"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            step = "?"
        raise CheckpointError(
            f"{self.folder} holds no checkpoint, but {self._note.name} beside it says that step_{step} was saved: mount or "
            f"restore the folder; to begin the run anew, remove {self._note}, or train under another --run-name"
        )

    def at(self, step: int) -> Saved:
        """The checkpoint of a step (collective). CheckpointError if it is missing or damaged."""
        return self._processes.on_first(lambda: self._whole(step))

    def check(self, step: int) -> None:
        """CheckpointError if the checkpoint of a step is missing or damaged (one rank)."""
        self._whole(step)

    def _whole(self, step: int) -> Saved:
        saved = read(self.folder / f"{layout.STEP}{step}")
        if saved.step != step:
            raise CheckpointError(f"{saved.path} holds step {saved.step}; give the folder its name back")
        return saved


def _names(folder: Path) -> list[str]:
    """Names in a folder; none where it does not exist. CheckpointError if it cannot be read."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error.strerror}): mount it or give its rights back; nothing was changed"
        ) from None


def _renew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _prove(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Read back what was written; CheckpointError if it differs from what should have been."""
    saved = read(folder)
    different = shards.same(shards.load(saved), tensors)
    if different is not None or writing.sha256_of_json(saved.state) != writing.sha256_of_json(state):
        raise CheckpointError(f"reading it back gives another {different or 'state'}")


def _cause(error: Exception, folder: Path, tensors: dict[str, Tensor]) -> object:
    """The error, or that the disk is full if that is the reason."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        full = shutil.disk_usage(folder).free < 2 * size
    except OSError:
        full = False
    return "the disk is full" if full or getattr(error, "errno", None) == errno.ENOSPC else error
