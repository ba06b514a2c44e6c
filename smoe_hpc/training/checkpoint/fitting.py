"""Whether a checkpoint is of a model: its names, shapes and grid."""

from __future__ import annotations

from torch import Tensor

from smoe_hpc.errors import CheckpointError
from smoe_hpc.training.checkpoint.manifest import Saved


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
