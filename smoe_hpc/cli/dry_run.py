"""What ``train --dry-run`` says: the recipe as it would be trained, the model's size, how processes share the batch.

Without the data at hand, on a login node say, it says what it can and names what needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoe_hpc.cli.arguments import SPLITS
from smoe_hpc.cli.figures import write_json
from smoe_hpc.cli.output import say
from smoe_hpc.errors import DataError, RunError

if TYPE_CHECKING:
    from smoe_hpc.config import Recipe

_GRIDS = ((8, 16), (8, 32), (16, 32))  # of which sizes that grow with the pixels alone are told from others


def describe(recipe: Recipe, world: int, json_file: Path | None) -> None:
    """Print the resolved recipe, parameters, samples, steps, and the share of each process; nothing is written but figures.

    Args:
        recipe: the experiment; its batch can be shared by ``world`` processes.
        world: number of processes.
        json_file: file for the figures.

    Raises:
        RunError: the batch is larger than the training split.
        DataError: data that are there, and damaged or of another kind.
        ConfigError: a model that these data cannot have.
    """
    from smoe_hpc.config import to_yaml
    from smoe_hpc.config.making import require_data

    try:
        require_data(recipe)
        missing = None
    except DataError as error:
        missing = str(error)
    facts, figures = _without_data(recipe, missing) if missing else _with_data(recipe)
    for line in to_yaml(recipe).split("\n"):
        say(line)
    steps = figures.get("steps_per_epoch")
    of = f"of {recipe.training.batch} samples on {world} process{'es' if world > 1 else ''}"
    facts["steps per epoch"] = "need the data" if steps is None else f"{steps:,} {of}"
    micro = recipe.training.batch // (world * recipe.training.accumulation)
    facts["each process"] = f"{recipe.training.accumulation} x {micro} samples a step"
    if missing:
        facts["data"] = missing
    for name, fact in facts.items():
        say(f"{name:<18} {fact}")
    write_json(json_file, {**figures, "world": world})


def _with_data(recipe: Recipe) -> tuple[dict[str, str], dict[str, Any]]:
    """Lines by their names, and figures."""
    from smoe_hpc.tasks import make_task

    task = make_task(recipe)
    samples = {split: len(task.samples(split)) for split in SPLITS}
    parameters = sum(parameter.numel() for parameter in task.build_model().parameters())
    steps = samples["train"] // recipe.training.batch
    if steps == 0:
        raise RunError(
            f"training.batch={recipe.training.batch}: the training split holds only {samples['train']} samples; take a "
            "smaller batch or more data"
        )
    facts = {"parameters": f"{parameters:,}", **{f"{split} samples": f"{number:,}" for split, number in samples.items()}}
    return facts, {"parameters": parameters, "samples": samples, "steps_per_epoch": steps}


def _without_data(recipe: Recipe, missing: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The same, as far as the recipe alone says it."""
    channels = _channels(recipe)
    fixed, each = (None, None) if channels is None else _parameters(recipe, *channels)
    if fixed is None:
        size = "need the data"
    else:
        size = f"{fixed:,}" + (f" and {each:,} for each grid point" if each else "")
    figures = {
        "parameters": fixed if each == 0 else None,
        "parameters_fixed": fixed,
        "parameters_per_grid_point": each,
        "samples": None,
        "steps_per_epoch": None,
        "missing": missing,
    }
    return {"parameters": size, "samples": "need the data"}, figures


def _channels(recipe: Recipe) -> tuple[int, int] | None:
    """Input and output channels, where the recipe alone says them."""
    data = recipe.data
    if recipe.task == "heat":
        return len(data.inputs), 1
    if data.variables is None:
        return None
    continuous = data.lead_mode == "continuous"
    incoming = len(data.inputs) * len(data.variables) + len(data.constants) + continuous
    return incoming, len(data.targets or data.variables) * (1 if continuous else len(data.all_leads))


def _parameters(recipe: Recipe, in_channels: int, out_channels: int) -> tuple[int | None, int | None]:
    """Parameters in any case, and for each grid point; (None, None) where they grow with the grid in another way."""
    import torch

    from smoe_hpc.models import build_model

    counts = []
    for rows, columns in _GRIDS:
        regions = torch.zeros(rows, columns, dtype=torch.int64)
        with torch.device("meta"):  # sizes alone: no memory, no numbers
            network = build_model(recipe, in_channels, out_channels, (rows, columns), regions)
        counts.append((rows * columns, sum(parameter.numel() for parameter in network.parameters())))
    (pixels, least), (more_pixels, more), (most_pixels, most) = counts
    each = (more - least) // (more_pixels - pixels)
    if any(count != least + each * (size - pixels) for size, count in ((more_pixels, more), (most_pixels, most))):
        return None, None
    return least - each * pixels, each
