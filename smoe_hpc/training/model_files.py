"""What a run leaves for those who use its network: weights, fixed fields, and the description of both."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from safetensors.torch import save
from torch import Tensor

from smoe_hpc.files import writing
from smoe_hpc.runs import description, layout
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.training.task import Task


def write_model(run: RunDirectory, task: Task, tensors: dict[str, Tensor], about: dict[str, Any], step: int) -> None:
    """Write the weights and, of a task that can be described, what makes them usable without its data.

    Args:
        run: where.
        task: of the run.
        tensors: parameters and buffers by name.
        about: metadata of the weights' file.
        step: after which the weights were taken.
    """
    # one key of metadata: safetensors orders several at random
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    writing.write_whole(run.weights, save(content, metadata={"smoe_hpc": json.dumps(about)}))
    write_description(run, task, step)


def write_description(run: RunDirectory, task: Task, step: int) -> None:
    """Write ``model.json`` and the fixed fields beside weights that are there."""
    described = task.describe()
    if described is None:
        return
    about, fields = described
    names = [run.weights.name]
    if fields:
        writing.write_whole(run.path / layout.FIXED_FIELDS, save({n: f.contiguous() for n, f in fields.items()}))
        names.append(layout.FIXED_FIELDS)
    digests = {name: writing.digest_of(run.path / name)[1] for name in names}
    description.write(run.path, replace(about, step=step, files=digests))
