"""Reading a DCP checkpoint's index without letting it run code.

DCP keeps its index (`.metadata`) as a pickle, which could call anything when read. This reader admits the few classes
that an index of plain tensors consists of and refuses everything else; tensors themselves are read with
``weights_only``.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from smoe_hpc.errors import CheckpointError

_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()) or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise CheckpointError(f"its index names {module}.{name}, which no index of tensors does; it was not written by us")


class PlainReader(dcp.FileSystemReader):
    """DCP's file reader with an index of plain classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. CheckpointError if it holds anything but what describes tensors."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
