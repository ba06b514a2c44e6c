"""The network that a recipe describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc import config
from smoe_hpc.models.resnet import build_resnet
from smoe_hpc.models.stack import build_stack


def build_model(
    recipe: config.Recipe,
    in_channels: int,
    out_channels: int,
    grid: tuple[int, int],
    region_map: Tensor | None = None,
    *,
    newest: Sequence[int] | None = None,
) -> nn.Module:
    """A new network [B, in_channels, H, W] -> [B, out_channels, H, W]; the recipe's seed alone decides its start values.

    Args:
        recipe: the experiment.
        in_channels, out_channels: of the data.
        grid: (H, W).
        region_map: [H, W] true regions where the data knows them.
        newest: input channels that hold the newest frame of each target, for a residual model; empty where there are none.

    Raises:
        ConfigError: the model does not fit these data.
    """
    seed = recipe.training.seed
    generator = torch.Generator().manual_seed(seed)
    if recipe.model.network == "resnet":
        sizes = (in_channels, out_channels, grid)
        network: nn.Module = build_resnet(recipe.model, *sizes, region_map, generator, newest=newest, seed=seed)
    else:
        network = build_stack(recipe.model, in_channels, grid, region_map, generator, newest=newest)
    network.register_load_state_dict_pre_hook(_name_shared)
    return network


def _name_shared(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a parameter that has several names (a shared gate's), and is kept under one of them, all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(prefix + name)
    for shared in names.values():
        there = next((name for name in shared if name in state), None)
        if there is not None:
            state.update({name: state[there] for name in shared if name not in state})
