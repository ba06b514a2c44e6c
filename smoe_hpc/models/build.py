"""The network that a recipe asks for, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence

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
    """A new network [B, in_channels, H, W] -> [B, out_channels, H, W], which the recipe's seed decides entirely.

    Args:
        recipe: the experiment.
        in_channels, out_channels: of the data.
        grid: (H, W).
        region_map: [H, W] true regions where the data knows them.
        newest: input channels that hold the newest frame of each target, for a residual model; empty where there are none.

    Raises:
        ConfigError: a model that these data cannot have.
    """
    seed = recipe.training.seed
    generator = torch.Generator().manual_seed(seed)
    if recipe.model.network == "resnet":
        sizes = (in_channels, out_channels, grid)
        return build_resnet(recipe.model, *sizes, region_map, generator, newest=newest, seed=seed)
    return build_stack(recipe.model, in_channels, grid, region_map, generator, newest=newest)
