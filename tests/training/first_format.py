"""Checkpoints of the first format, written as version 1 wrote them: by torch.distributed.checkpoint, with a manifest."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from smoe_hpc.files import writing
from smoe_hpc.training.checkpoint.manifest import kind_of


def write(path: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], identity: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path, sync_files=False, thread_count=1), no_dist=True)
    body = {
        "format": 1,
        "step": step,
        "identity": identity,
        "state": state,
        "tensors": {name: [list(kind_of(t)[0]), kind_of(t)[1]] for name, t in tensors.items() if isinstance(t, torch.Tensor)},
    }
    seal(path, body)


def seal(path: Path, body: dict[str, Any]) -> None:
    """Write the manifest with the right checksums of whatever lies in the folder."""
    names = [file.name for file in path.iterdir() if file.name != "manifest.json" and file.is_file()]
    body = {**body, "files": {name: list(writing.digest_of(path / name)) for name in sorted(names)}}
    writing.write_json(path / "manifest.json", {**body, "sha256": writing.sha256_of_json(body)})


class EarlyEleven(pickle._Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 do: ``getattr(class, name)``."""

    def reducer_override(self, value: Any) -> Any:
        from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

        return (getattr, (type(value), value.name)) if isinstance(value, _MEM_FORMAT_ENCODING) else NotImplemented


def as_early_eleven(index: bytes) -> bytes:
    """An index as an early Python 3.11 would have written it."""
    content = io.BytesIO()
    EarlyEleven(content).dump(pickle.loads(index))
    assert b"getattr" in content.getvalue()
    return content.getvalue()
