"""Two processes that run different layers of one model, a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smoe_hpc.layers import GhostBatchNorm2d, RoutingLoss, SpatialMoE2d, end_step, routing_loss, routing_metrics

GRIDS = ((4, 6), (3, 8))
SCHEDULE: tuple[tuple[list[int], list[int]], ...] = (([], []), ([0], []), ([0], [1]))
"""Branches that the two processes run in each step."""


def branches() -> nn.ModuleList:
    """Two branches on grids of their own, each with a mean of errors and a normalisation to renew."""
    generator = torch.Generator().manual_seed(0)
    running = RoutingLoss(error_scale="running_mean")
    return nn.ModuleList(
        nn.Sequential(
            SpatialMoE2d(2, 6, 2, grid, routing_loss=running, damping=None, generator=generator),
            GhostBatchNorm2d(2, group=2),
        )
        for grid in GRIDS
    )


def drawn(branch: int, step: int) -> torch.Tensor:
    """Input [2, 2, H, W] of a branch."""
    return torch.randn(2, 2, *GRIDS[branch], generator=torch.Generator().manual_seed(10 * branch + step))


def run(model: nn.ModuleList, which: list[int], step: int) -> dict[str, torch.Tensor]:
    """Forward and backward of these branches and the end of the step; the metrics."""
    model.zero_grad()
    for branch in which:
        (model[branch](drawn(branch, step)).pow(3).mean() + routing_loss(model[branch])).backward()
    end_step(model, step)
    return routing_metrics(model)


def of_process(rank: int) -> list[Any]:
    """What a process ends with, and the names of its metrics after each step."""
    model = branches()
    names = [list(run(model, which[rank], step)) for step, which in enumerate(SCHEDULE)]
    return [model.state_dict(), names]
