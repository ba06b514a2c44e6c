"""What a checkpoint holds of a model and its optimiser, and the way back.

Names: ``model.<parameter or buffer>``, ``routing.<choice>`` (which experts work where: state of SMoE layers that does
not always follow from the parameters), ``optimizer.<state>.<parameter>``. A tensor with several names (a shared gate)
is kept once, under its first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import CheckpointError, RunError
from smoe_hpc.layers import load_routing_state, routing_state
from smoe_hpc.runs.position import Position, is_count
from smoe_hpc.training.checkpoint import Saved, check_fits, load
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.task import Task

SPLITS = ("train", "validation", "test")


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """Parameters and persistent buffers by ``model.<name>``."""
    kept = engine.model.state_dict()
    shared = dict(engine.model.named_parameters(remove_duplicate=False))
    named = dict(engine.model.named_parameters())
    return {
        f"model.{name}": tensor
        for name, tensor in kept.items()
        if isinstance(tensor, Tensor) and (name in named or name not in shared)
    }


def all_tensors(engine: Engine) -> dict[str, Tensor]:
    """Everything that a checkpoint keeps (collective with ZeRO)."""
    routing = {f"routing.{name}": tensor for name, tensor in routing_state(engine.model).items()}
    optimizer = {f"optimizer.{name}": tensor for name, tensor in engine.optimizer_state().items()}
    return {**model_tensors(engine), **routing, **optimizer}


def load_model(engine: Engine, saved: Saved, task: Task) -> None:
    """Parameters, buffers and routing from a checkpoint. CheckpointError if it is of another model or grid."""
    expected = model_tensors(engine)
    check_fits(saved, expected, "model.", grid_in_words(task))
    found = load(saved, lambda name: name.startswith(("model.", "routing.")))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    load_routing_state(engine.model, _under("routing.", found))
    engine.weights_changed()


def load_everything(engine: Engine, saved: Saved, task: Task) -> None:
    """As `load_model`, and the optimiser's state."""
    load_model(engine, saved, task)
    found = load(saved, lambda name: name.startswith("optimizer."))
    engine.load_optimizer_state(_under("optimizer.", found), saved.step)


def resume_state(saved: Saved | None) -> tuple[Position, dict[str, int]]:
    """Position and sizes of the log files of a checkpoint; the beginning for None.

    Raises:
        CheckpointError: its small state is not that of a run.
    """
    if saved is None:
        return Position(), {}
    try:
        position, sizes = Position.from_dict(saved.state["position"]), dict(saved.state["log"])
        if not all(map(is_count, sizes.values())):
            raise ValueError("sizes of log files are no whole numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.path} holds no state of a run ({error}); it was not written by us") from None
    return position, sizes


def grid_in_words(task: Task) -> str:
    """The grid as it is written into checkpoints and compared."""
    return str(task.grid.describe())


def data_identity(task: Task) -> dict[str, str]:
    """{"data.<split>": digest} of what the splits of a task hold, for those whose samples come from a store.

    Raises:
        DataError: data that is missing or damaged.
    """
    stores = {split: store_of(task, split) for split in SPLITS}
    digests = {id(store): store.digest() for store in {id(s): s for s in stores.values() if s is not None}.values()}
    return {f"data.{split}": digests[id(store)] for split, store in stores.items() if store is not None}


def refuse_other_data(task: Task, run: Path, identity: dict[str, str]) -> None:
    """Check that the splits hold the data that a run was trained on.

    Args:
        task: whose data.
        run: the run's folder.
        identity: what the run's checkpoints keep.

    Raises:
        RunError: a split holds other data.
        DataError: data that is missing or damaged.
    """
    for key, digest in data_identity(task).items():
        if identity.get(key, digest) != digest:
            split = key.removeprefix("data.")
            raise RunError(
                f"run directory {run} belongs to other {split} data than {store_of(task, split).path} holds now; put "
                "its data back, or train under another --run-name"
            )


def store_of(task: Task, split: str) -> Any:
    """The store behind a split; None where samples come from elsewhere."""
    return getattr(task.samples(split), "store", None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
