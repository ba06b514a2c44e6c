"""A run's network, built from its description and filled with its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

from smoe_hpc.config import Recipe
from smoe_hpc.errors import CheckpointError
from smoe_hpc.files import writing
from smoe_hpc.models import build_model
from smoe_hpc.runs.description import Description
from smoe_hpc.runs.layout import FIXED_FIELDS, WEIGHTS


def load_network(folder: Path, about: Description, recipe: Recipe) -> tuple[nn.Module, Tensor | None]:
    """A network with a run's weights, in evaluation mode on the CPU, and the constants [K, H, W] that its inputs end with.

    Raises:
        CheckpointError: a file that is missing, is not what was written, or does not fit the description.
    """
    fixed = _tensors(folder, FIXED_FIELDS, about) if FIXED_FIELDS in about.files else {}
    constants = fixed.get("constants")
    if about.constants and (constants is None or tuple(constants.shape) != (len(about.constants), *about.grid.shape)):
        raise CheckpointError(f"{folder / FIXED_FIELDS} does not hold the constants {', '.join(about.constants)}")
    newest = [] if about.newest is None else list(about.newest)
    sizes = (about.in_channels, about.out_channels, about.grid.shape)
    network = build_model(recipe, *sizes, fixed.get("region_map"), newest=newest)
    weights = _tensors(folder, WEIGHTS, about)
    if recipe.training.precision == "float64":
        network = network.double()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # of several lines, one a tensor
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the network of the run's recipe: {first}") from None
    return network.eval(), constants


def _tensors(folder: Path, name: str, about: Description) -> dict[str, Tensor]:
    """Tensors of a file that the description lists."""
    path = folder / name
    try:
        with writing.open_regular(path) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != about.files.get(name):
            raise CheckpointError(f"{path} is not what was written with the run's model.json; restore it")
        return dict(parse_tensors(content))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); restore it") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} holds no tensors ({error}); restore it") from None
