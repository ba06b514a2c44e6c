"""The manifest of a checkpoint: what it says, read with suspicion, and held against the files beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import CheckpointError
from smoe_hpc.files import writing

NAME = "manifest.json"
FORMAT = 2
FIRST_FORMAT = 1
LARGEST = 64 << 20
"""Bytes of a manifest at most: some hundred thousand tensors."""

DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FIRST_FORMAT_NAME = re.compile(r"\.metadata|__[0-9]+_[0-9]+\.distcp")
_SHA256 = re.compile(r"[0-9a-f]{64}")

TensorKind = tuple[tuple[int, ...], str]
"""Shape and name of the dtype of a tensor."""


class OutdatedCheckpoint(CheckpointError):
    """A checkpoint in the form of an earlier version, which `smoe-hpc checkpoint upgrade` turns into today's."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose checksums were right.

    Attributes:
        path: its folder.
        step: optimiser step after which it was taken.
        state: the small state that was given to `Checkpoints.save`.
        identity: what must fit besides tensors: ``recipe`` (hash), ``grid`` and ``data.<split>`` (digests).
        tensors: {name: (shape, dtype)}.
        shards: {name: file in which the tensor lies}; empty in the first format, whose index is another file.
    """

    path: Path
    step: int
    state: dict[str, Any]
    identity: dict[str, str]
    tensors: dict[str, TensorKind]
    shards: dict[str, str]


def read(path: Path) -> Saved:
    """Check a checkpoint's manifest and the checksum of each of its files.

    Raises:
        CheckpointError: missing, truncated, changed, or with an entry that no checkpoint has; it names the file.
        OutdatedCheckpoint: it is in the form of an earlier version.
    """
    return _read(path, FORMAT)


def read_first_format(path: Path) -> Saved:
    """As `read`, of a checkpoint of the first format (`first_format.py` reads its tensors)."""
    return _read(path, FIRST_FORMAT)


def write(
    path: Path,
    step: int,
    kinds: dict[str, TensorKind],
    shards: dict[str, str],
    digests: dict[str, list[Any]],
    state: dict[str, Any],
    identity: dict[str, str],
) -> None:
    """Write the manifest of the folder ``path``, whose files are complete; OSError if that fails.

    Args:
        path: the folder.
        step: see `Saved`.
        kinds: {name: (shape, dtype)} of all tensors.
        shards: {name: file}.
        digests: {file: [bytes, sha256]}.
        state: see `Saved`.
        identity: see `Saved`.
    """
    body = {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "state": state,
        "tensors": {name: [list(shape), dtype, shards[name]] for name, (shape, dtype) in kinds.items()},
        "files": digests,
    }
    writing.write_json(path / NAME, {**body, "sha256": writing.sha256_of_json(body)})


def kind_of(tensor: Tensor) -> TensorKind:
    """Shape and dtype as a manifest has them."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _read(path: Path, version: int) -> Saved:
    body = _body(path / NAME, version)
    named = _FIRST_FORMAT_NAME if version == FIRST_FORMAT else _PLAIN_NAME
    for name, (size, sha256) in body["files"].items():
        if not named.fullmatch(name):
            raise CheckpointError(f"{path / NAME} names the file {name!r}; files of a checkpoint lie inside its folder")
        _check_file(path / name, size, sha256)
    tensors = {name: (tuple(entry[0]), entry[1]) for name, entry in body["tensors"].items()}
    shards = {name: entry[2] for name, entry in body["tensors"].items()} if version == FORMAT else {}
    unlisted = sorted(set(shards.values()) - set(body["files"]))
    if unlisted:
        raise CheckpointError(f"{path / NAME} has no checksum of {unlisted[0]!r}; the checkpoint was not written by us")
    return Saved(path, body["step"], body["state"], body["identity"], tensors, shards)


def _body(manifest: Path, version: int) -> dict[str, Any]:
    try:
        body: Any = writing.read_json(manifest, LARGEST)
        digest = body.pop("sha256")
        if digest != writing.sha256_of_json(body):
            raise ValueError("its checksum differs")
        if body["format"] == FIRST_FORMAT != version:
            raise OutdatedCheckpoint(
                f"{manifest.parent} was written by an earlier version; `smoe-hpc checkpoint upgrade OLD NEW` makes it, or its "
                "whole run, one that this version reads"
            )
        if body["format"] != version:
            raise ValueError(f"it has format {body['format']!r}, wanted is {version}")
        wrong = _wrong_entry(body, version)
        if wrong:
            raise ValueError(f"its {wrong} is not what a checkpoint has")
    except FileNotFoundError:
        raise CheckpointError(f"{manifest} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{manifest} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OutdatedCheckpoint):
            raise
        raise CheckpointError(f"{manifest} is damaged ({error})") from None
    return dict(body)


def _wrong_entry(body: dict[str, Any], version: int) -> str | None:
    """The entry that is of another kind than the format has, or None."""
    if not _count(body["step"]):
        return "step"
    if not isinstance(body["state"], dict):
        return "state"
    identity = body["identity"]
    if not (isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values())):
        return "identity"
    for name, entry in body["files"].items():
        if not (_list(entry, 2) and _count(entry[0]) and isinstance(entry[1], str) and _SHA256.fullmatch(entry[1])):
            return f"file {name!r}"
    for name, entry in body["tensors"].items():
        if not (_list(entry, 3 if version == FORMAT else 2) and isinstance(entry[0], list) and all(map(_count, entry[0]))):
            return f"tensor {name!r}"
        if entry[1] not in DTYPES or not all(isinstance(value, str) for value in entry[1:]):
            return f"tensor {name!r}"
    return None


def _list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_file(file: Path, size: int, sha256: str) -> None:
    try:
        found, digest = writing.digest_of(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from None
    if (found, digest) != (size, sha256):
        raise CheckpointError(f"{file} is damaged: its content is not what was written")
