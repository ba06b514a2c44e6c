"""Checkpoints: logical tensors that any number of ranks and any ZeRO stage can load, whole or not there.

A checkpoint is a folder ``step_N`` in the form of torch.distributed.checkpoint (DCP) with a `manifest.json` beside it:
every tensor's name, shape and dtype, a checksum of every file, the recipe's hash, the grid, and the small state (step,
position in the epoch, schedule) as plain JSON. It is written under another name, synced, and renamed when whole, so a
process may die at any moment. Nothing random is kept: order and noise are functions of seed, epoch and step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from smoe_hpc.errors import CheckpointError, SmoeError
from smoe_hpc.training import files
from smoe_hpc.training.plain_metadata import PlainReader
from smoe_hpc.training.processes import Processes

_log = logging.getLogger(__name__)
_PARTIAL = ".partial_"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose checksums were right.

    Attributes:
        path: its folder.
        step: optimiser step after which it was taken.
        state: the small state that was given to `Checkpoints.save`.
        identity: what must fit besides tensors: ``recipe`` (hash), ``grid`` and ``data.<split>`` (digests).
        tensors: {name: (shape, dtype)}.
    """

    path: Path
    step: int
    state: dict[str, Any]
    identity: dict[str, str]
    tensors: dict[str, tuple[tuple[int, ...], str]]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where ``step_N`` lie.
        processes: the ranks; `save` and `newest` are collective over them.
        keep: how many of the newest stay; the best stays besides.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int) -> None:
        self.folder = folder
        self._processes = processes
        self._keep = keep

    def clear_partial(self) -> None:
        """Remove what a killed process left half-written (rank 0, with the run locked)."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        found = [path.name.removeprefix("step_") for path in self.folder.glob("step_*")]
        return sorted(int(number) for number in found if number.isdigit())

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], identity: dict[str, str], best: int | None
    ) -> None:
        """Write ``step_<step>`` and remove what is no longer to be kept (collective).

        Args:
            step: optimiser steps done.
            tensors: whole tensors, equal on every rank; the ranks share the writing.
            state: plain JSON values.
            identity: see `Saved`; checked at load and when a run goes on.
            best: step of the best checkpoint, which stays.

        Raises:
            CheckpointError: it could not be written (disk full, ...); those before are untouched.
        """
        partial = self.folder / f"{_PARTIAL}step_{step}"
        try:
            self._processes.on_first(lambda: _renew(partial))
            self._write_tensors(partial, tensors)
            digests = self._checksums(partial)
            self._processes.on_first(lambda: self._commit(partial, step, tensors, state, identity, digests))
        except (OSError, RuntimeError, SmoeError) as error:
            full = shutil.disk_usage(self.folder).free < 2 * sum(t.numel() * t.element_size() for t in tensors.values())
            if self._processes.first:
                shutil.rmtree(partial, ignore_errors=True)
            cause = "the disk is full" if full else error
            kept = self.steps()
            remedy = f"step_{kept[-1]} is intact: " if kept else ""
            raise CheckpointError(
                f"checkpoint step_{step} was not written to {self.folder} ({cause}); "
                f"{remedy}make room and start the same command again"
            ) from error
        if self._processes.first:
            self._prune(best)

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        alone = self._processes.world == 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it saves in a single process is meant
                dcp.save(
                    dict(tensors),
                    storage_writer=dcp.FileSystemWriter(folder, sync_files=True, thread_count=1),
                    process_group=self._processes.control,
                    no_dist=alone,
                )
        except dcp.api.CheckpointException as error:  # on every rank, with the causes of those that failed
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"rank {rank}: {cause}") from error

    def _checksums(self, folder: Path) -> dict[str, list[Any]]:
        """{file: [bytes, sha256]}, each rank reading what it wrote (collective)."""
        own = [path for path in sorted(folder.iterdir()) if _writer(path.name) == self._processes.rank]
        digests = self._processes.together(lambda: {path.name: [path.stat().st_size, files.sha256_of(path)] for path in own})
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
        state: dict[str, Any],
        identity: dict[str, str],
        digests: dict[str, list[Any]],
    ) -> None:
        body = {
            "format": FORMAT,
            "step": step,
            "identity": identity,
            "state": state,
            "tensors": {name: [list(t.shape), _dtype(t)] for name, t in tensors.items()},
            "files": digests,
        }
        files.write_json(partial / MANIFEST, {**body, "sha256": files.sha256_of_json(body)})
        final = self.folder / f"step_{step}"
        if final.exists():  # one that was found damaged, and whose step has been made again
            shutil.rmtree(final)
        os.rename(partial, final)
        files.sync_folder(self.folder)

    def _prune(self, best: int | None) -> None:
        for step in self.steps()[: -self._keep]:
            if step != best:
                shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)

    def newest(self) -> Saved | None:
        """The newest whole checkpoint, or None where none was ever made (collective). A damaged one is passed over.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        return self._processes.on_first(self._newest)

    def _newest(self) -> Saved | None:
        problems = []
        for step in reversed(self.steps()):
            try:
                saved = read(self.folder / f"step_{step}")
            except CheckpointError as error:
                problems.append(str(error))
                _log.warning("%s; trying the one before", error)
            else:
                return saved
        if problems:
            raise CheckpointError(f"no whole checkpoint in {self.folder}: {problems[0]}; restore one, or remove the folder")
        return None

    def at(self, step: int) -> Saved:
        """The checkpoint of a step (collective). CheckpointError if it is missing or damaged."""
        return self._processes.on_first(lambda: read(self.folder / f"step_{step}"))


def read(path: Path) -> Saved:
    """Check a checkpoint's manifest and the checksum of each of its files.

    Raises:
        CheckpointError: missing, truncated or changed; it names the file.
    """
    try:
        body: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        digest = body.pop("sha256")
        if digest != files.sha256_of_json(body):
            raise ValueError("its checksum differs")
        if body["format"] != FORMAT:
            raise ValueError(f"it has format {body['format']}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error})") from None
    for name, (size, sha256) in body["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size or files.sha256_of(file) != sha256:
            raise CheckpointError(f"{file} is damaged: its content is not what was written")
    tensors = {name: (tuple(shape), dtype) for name, (shape, dtype) in body["tensors"].items()}
    return Saved(path, body["step"], body["state"], body["identity"], tensors)


def load(saved: Saved, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, on the CPU; those whose name is wanted. Each rank reads for itself.

    Raises:
        CheckpointError: the files are not a checkpoint of tensors.
    """
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in saved.tensors.items() if wanted(name)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loads in a single process is meant
            dcp.load(tensors, storage_reader=PlainReader(saved.path), no_dist=True)
    except dcp.api.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{saved.path} cannot be loaded: {cause}") from error
    return tensors


def check_fits(saved: Saved, expected: dict[str, Tensor], prefix: str, grid: str) -> None:
    """Refuse a checkpoint of another model.

    Args:
        saved: the checkpoint.
        expected: the tensors that the model has, by name.
        prefix: names to compare begin with it.
        grid: the model's grid, in words.

    Raises:
        CheckpointError: it names the grids, or the first missing, unexpected and mis-shaped tensors.
    """
    found = {name: shape for name, (shape, _) in saved.tensors.items() if name.startswith(prefix)}
    if saved.identity.get("grid") != grid:
        raise CheckpointError(
            f"{saved.path} is of the grid {saved.identity.get('grid')}, the run has {grid}; use the recipe it was made with"
        )
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shaped = [name for name in expected if name in found and tuple(expected[name].shape) != found[name]]
    said = []
    if missing:
        said.append(f"it lacks {_some(missing, prefix)}")
    if unexpected:
        said.append(f"it has {_some(unexpected, prefix)} too many")
    if shaped:
        name = shaped[0]
        said.append(f"{name.removeprefix(prefix)} is {list(found[name])} and should be {list(expected[name].shape)}")
    if said:
        raise CheckpointError(f"{saved.path} is of another model: {'; '.join(said)}; use the recipe it was made with")


def _some(names: list[str], prefix: str) -> str:
    first = ", ".join(name.removeprefix(prefix) for name in names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _renew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _writer(name: str) -> int:
    """Rank that wrote a file of DCP: ``__<rank>_<part>.distcp``; the metadata is rank 0's."""
    return int(name.split("_")[2]) if name.startswith("__") else 0


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
