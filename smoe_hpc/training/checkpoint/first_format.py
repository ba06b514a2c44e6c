"""Reading checkpoints of the first format, which were torch.distributed.checkpoint's (DCP), without letting them run code.

DCP keeps its index (`.metadata`) as a pickle. A pickle calls what it names; here every name is answered by a stand-in
that only remembers, and a name that no index of tensors has is refused. So nothing of torch, pathlib or the interpreter
is called, and it does not matter which Python wrote the index (early 3.11 names ``builtins.getattr`` for a member of an
enumeration). A tensor itself is a zip archive, of which torch's restricted reader takes tensors and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import CheckpointError
from smoe_hpc.files import writing
from smoe_hpc.training.checkpoint.manifest import DTYPES, Saved, kind_of

_INDEX = ".metadata"
_LARGEST_INDEX = 256 << 20
_METADATA = "torch.distributed.checkpoint.metadata"
_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


class _Record:
    """An object of the index: the attributes that were set on it."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise CheckpointError("its index sets attributes as no index does")
        self.__dict__.update({str(key): value for key, value in state.items()})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:  # keys of the index: a tensor's name and where its piece begins
        return hash((getattr(self, "fqn", None), getattr(self, "index", None)))


class _Properties(_Record):
    """Properties of a tensor, whose state is a tuple: dtype, layout, requires_grad, memory format, pin_memory."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or not state:
            raise CheckpointError("its index describes a tensor as no index does")
        self.dtype = state[0]


class _MemoryFormat:
    """DCP's enumeration of memory formats, which is looked at by nobody."""

    def __init__(self, value: object = None) -> None:
        pass


def _member(of: object, name: object) -> object:
    """What early 3.11 writes for a member of an enumeration; any other attribute of anything is refused."""
    if of is not _MemoryFormat or name not in _FORMATS:
        raise CheckpointError(f"its index asks for the attribute {name!r}, which no index of tensors does")
    return _MemoryFormat()


def _size(values: object = ()) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, int) and value >= 0 for value in values):
        raise CheckpointError("its index has a size that is none")
    return tuple(values)


def _path(*parts: object) -> str:
    return _text(*parts[:1])


def _text(value: object = "") -> str:
    if not isinstance(value, str):
        raise CheckpointError("its index has something else where a name stands")
    return value


def _record(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


_STAND_INS: dict[tuple[str, str], Any] = {
    **{
        (_METADATA, name): _record(name)
        for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")
    },
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("builtins", "getattr"): _member,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _record("_StorageInfo"),
    ("torch.serialization", "_get_layout"): _text,
    ("torch", "Size"): _size,
    **{(module, name): _path for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "PurePosixPath")},
    **{("torch", name): name for name in DTYPES},
}


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get((module, name))
        if found is None:
            raise CheckpointError(f"its index names {module}.{name}, which no index of tensors does; it was not written by us")
        return found

    def persistent_load(self, identity: Any) -> Any:
        raise CheckpointError("its index refers to objects outside, which no index does")


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies: bytes ``offset`` to ``offset + length`` of a file."""

    file: str
    offset: int
    length: int


def load(saved: Saved, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors of a checkpoint of the first format (`read_first_format`), whole, on the CPU; those whose name is wanted.

    Raises:
        CheckpointError: an index with anything but plain tensors in files of the folder, or files that differ from it.
    """
    pieces = _index(saved)
    return {name: _tensor(saved, name, pieces[name]) for name in saved.tensors if wanted(name)}


def _index(saved: Saved) -> dict[str, _Piece]:
    """{name: where it lies}, each tensor of the manifest in one piece."""
    try:
        with writing.open_regular(saved.path / _INDEX) as file:
            content = file.read(_LARGEST_INDEX + 1)
        if len(content) > _LARGEST_INDEX:
            raise ValueError("it is too large")
        index = _IndexReader(io.BytesIO(content)).load()  # type: ignore[attr-defined]  # mypy takes our io/ for it
        found = {key.fqn: _piece(info) for key, info in index.storage_data.items()}
        whole = {name: _whole(described) for name, described in index.state_dict_metadata.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{saved.path}: {error}") from None
    except Exception as error:  # whatever a damaged pickle leads to
        raise CheckpointError(f"{saved.path / _INDEX} is damaged ({type(error).__name__}: {error})") from None
    if not found.keys() == whole.keys() == saved.tensors.keys():
        odd = sorted((found.keys() ^ saved.tensors.keys()) | (whole.keys() ^ saved.tensors.keys()))[0]
        raise CheckpointError(f"{saved.path}: index and manifest differ about {odd!r}; it was not written by us")
    for name, kind in saved.tensors.items():
        if whole[name] != kind:
            raise CheckpointError(f"{saved.path}: index and manifest differ about {name!r}; it was not written by us")
    listed = {path.name for path in saved.path.iterdir()}
    for name, piece in found.items():
        if piece.file not in listed or piece.file == _INDEX:
            raise CheckpointError(f"{saved.path}: {name} lies in {piece.file!r}, which is no file of the checkpoint")
    return found


def _piece(info: Any) -> _Piece:
    piece = _Piece(info.relative_path, info.offset, info.length)
    if not (isinstance(piece.file, str) and type(piece.offset) is int and type(piece.length) is int):
        raise CheckpointError("its index places a tensor as no index does")
    if piece.offset < 0 or piece.length < 0 or getattr(info, "transform_descriptors", None):
        raise CheckpointError("its index places a tensor as no index does")
    return piece


def _whole(described: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a tensor that is kept in one piece."""
    chunks = described.chunks
    if len(chunks) != 1 or any(chunks[0].offsets) or chunks[0].sizes != described.size:
        raise CheckpointError("its index has tensors in several pieces")
    return described.size, described.properties.dtype


def _tensor(saved: Saved, name: str, piece: _Piece) -> Tensor:
    try:
        with writing.open_regular(saved.path / piece.file) as file:
            file.seek(piece.offset)
            content = file.read(piece.length)
        archive = io.BytesIO(content)  # type: ignore[attr-defined]  # as above
        tensor = torch.load(archive, map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or kind_of(tensor) != saved.tensors[name]:
            raise ValueError("it holds something else than its index says")
    except Exception as error:  # torch's reader raises what a damaged archive leads to
        raise CheckpointError(f"{saved.path / piece.file}: {name} cannot be read ({str(error).splitlines()[0]})") from None
    return tensor.detach()
