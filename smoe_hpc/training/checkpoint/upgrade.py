"""Turning checkpoints of earlier versions into today's form; the old ones stay as they are."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from smoe_hpc.errors import CheckpointError
from smoe_hpc.files import writing
from smoe_hpc.runs import layout
from smoe_hpc.training.checkpoint import first_format, manifest, shards

_STEP = re.compile(rf"{layout.STEP}[0-9]+")


def upgrade(old: Path, new: Path) -> list[Path]:
    """Write a checkpoint, or a run with all its checkpoints, in today's form; whole or not there.

    Args:
        old: a folder ``step_N``, or the folder of a run; only read.
        new: what to make; it must not exist.

    Returns:
        The checkpoints that were made.

    Raises:
        CheckpointError: nothing to upgrade there, a damaged checkpoint, or one with anything but plain tensors in it;
            ``new`` exists or cannot be written.
    """
    is_run = (old / layout.CONFIG).is_file()
    steps = [old]
    if is_run:
        steps = sorted(path for path in (old / layout.CHECKPOINTS).glob(f"{layout.STEP}*") if _STEP.fullmatch(path.name))
    if not steps or not (is_run or (old / manifest.NAME).exists()):
        raise CheckpointError(f"{old} is neither a checkpoint (a folder with {manifest.NAME}) nor a run with checkpoints")
    if new.exists() or new.is_symlink():
        raise CheckpointError(f"{new} exists; name a folder that does not")
    partial = new.with_name(f".partial_{new.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if is_run:
            shutil.copytree(old, partial, ignore=shutil.ignore_patterns(layout.CHECKPOINTS, layout.LOCK), symlinks=True)
            for step in steps:
                _upgrade_one(step, partial / layout.CHECKPOINTS / step.name)
        else:
            _upgrade_one(old, partial)
        os.rename(partial, new)
        writing.sync(new.parent)
    except OSError as error:
        raise CheckpointError(
            f"{new} cannot be written ({error.strerror or error}); make room, or name another place"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [new / layout.CHECKPOINTS / step.name for step in steps] if is_run else [new]


def _upgrade_one(old: Path, new: Path) -> None:
    try:
        manifest.read(old)
    except manifest.OutdatedCheckpoint:
        pass
    else:  # it is in today's form already
        shutil.copytree(old, new)
        return
    saved = manifest.read_first_format(old)
    tensors = first_format.load(saved)
    new.mkdir(parents=True)
    (plan,) = shards.assign({name: t.numel() * t.element_size() for name, t in tensors.items()}, ranks=1)
    for file, names in plan.items():
        shards.write(new / file, {name: tensors[name] for name in names})
    digests = {file: list(writing.digest_of(new / file)) for file in plan}
    placed = {name: file for file, names in plan.items() for name in names}
    manifest.write(new, saved.step, saved.tensors, placed, digests, saved.state, saved.identity)
    different = shards.same(shards.load(manifest.read(new)), tensors)
    if different is not None:
        raise CheckpointError(f"{new}: reading it back gives another {different}; the disk may be at fault")
