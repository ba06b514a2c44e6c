"""Tensors to safetensors files and back: who writes which, and reading those that are wanted.

Dimensions: R ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smoe_hpc.errors import CheckpointError
from smoe_hpc.training.checkpoint.manifest import DTYPES, Saved, kind_of

SHARD = 2 << 30
"""Bytes of a file at most, but for a tensor that alone is larger."""

WORTH_A_WRITER = 64 << 20
"""Bytes for which one more rank writes: few files, sized to the data."""


def assign(sizes: dict[str, int], ranks: int, shard: int = SHARD, worth: int = WORTH_A_WRITER) -> list[dict[str, list[str]]]:
    """Which rank writes which tensors into which file.

    Args:
        sizes: bytes of each tensor by name.
        ranks: R.
        shard: largest file, but for one that holds a single tensor.
        worth: bytes for each rank that writes.

    Returns:
        For each of the R ranks {file: names}; ranks beyond what the data are worth write nothing. Equal on every rank.

    >>> assign({"a": 5, "b": 3, "c": 3}, ranks=3, shard=5, worth=6)
    [{'tensors_00000.safetensors': ['a']}, {'tensors_00001.safetensors': ['b'], 'tensors_00002.safetensors': ['c']}, {}]
    """
    writers = max(1, min(ranks, -(-sum(sizes.values()) // worth)))
    loads, names = [0] * writers, [[] for _ in range(writers)]  # type: tuple[list[int], list[list[str]]]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        names[least].append(name)
    plan: list[dict[str, list[str]]] = [{} for _ in range(ranks)]
    number = 0
    for rank, own in enumerate(names):
        for group in _groups(own, sizes, shard):
            plan[rank][f"tensors_{number:05d}.safetensors"] = group
            number += 1
    return plan


def _groups(names: list[str], sizes: dict[str, int], shard: int) -> list[list[str]]:
    groups: list[list[str]] = []
    room = -1
    for name in names:
        if not groups or sizes[name] > room:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def check_savable(tensors: dict[str, Tensor]) -> None:
    """CheckpointError where a tensor's dtype is none that a checkpoint keeps."""
    for name, tensor in tensors.items():
        if kind_of(tensor)[1] not in DTYPES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which a checkpoint does not keep; it keeps {', '.join(DTYPES)}")


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors into a new file, on the disk when this returns; OSError if that fails."""
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in whole.items():  # safetensors refuses names that share memory
        at = tensor.untyped_storage().data_ptr()
        if at in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            whole[name] = tensor.clone()
        seen.add(at)
    try:
        save_file(whole, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(saved: Saved, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors of a checkpoint, whole, on the CPU; those whose name is wanted. Each rank reads for itself.

    Raises:
        CheckpointError: a file does not hold what the manifest says.
    """
    by_file: dict[str, list[str]] = {}
    for name, file in saved.shards.items():
        if wanted(name):
            by_file.setdefault(file, []).append(name)
    found: dict[str, Tensor] = {}
    for file, names in by_file.items():
        try:
            with safe_open(saved.path / file, framework="pt", device="cpu") as content:
                for name in names:
                    found[name] = content.get_tensor(name).clone()  # it lay in the mapped file, which may be removed
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{saved.path / file} cannot be loaded: {error}") from error
    for name, tensor in found.items():
        if kind_of(tensor) != saved.tensors[name]:
            shape, dtype = kind_of(tensor)
            raise CheckpointError(f"{saved.path / saved.shards[name]}: {name} is {dtype} {list(shape)}, its manifest differs")
    return {name: found[name] for name in saved.tensors if name in found}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first name under which two sets of tensors differ, in any bit; None where they are equal."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())[0]
    return next((name for name in one if not _equal_bits(one[name], other[name])), None)


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    if kind_of(one) != kind_of(other):
        return False
    first, second = (t.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)
