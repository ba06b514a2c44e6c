"""Two processes train one network under DDP and FSDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from smoe_hpc.errors import SmoeError
from smoe_hpc.layers import (
    GhostBatchNorm2d,
    RoutingLoss,
    SpatialMoE2d,
    end_step,
    hold_routing,
    parameter_groups,
    routing_loss,
    routing_metrics,
)

GRID = (6, 8)


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    running = RoutingLoss(error_scale="running_mean")
    return nn.Sequential(
        SpatialMoE2d(3, 8, 4, GRID, routing_loss=running, generator=generator),
        GhostBatchNorm2d(4, group=2),
        nn.ReLU(),
        SpatialMoE2d(4, 7, 2, GRID, expert_order="id", generator=generator),  # 7 experts do not part evenly
    )


def sharded(each: bool) -> nn.Module:
    model = network()
    for layer in model:
        if each and isinstance(layer, SpatialMoE2d):
            fully_shard(layer)
    return fully_shard(model)


def flat(each: bool, keeps: bool = True) -> nn.Module:
    policy = ModuleWrapPolicy({SpatialMoE2d}) if each else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(network(), auto_wrap_policy=policy, use_orig_params=keeps, device_id=cpu)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: nn.parallel.DistributedDataParallel(network()),
    "fully_shard": lambda: sharded(False),
    "fully_shard of layers": lambda: sharded(True),
    "flat": lambda: flat(False),
    "flat layers": lambda: flat(True),
}


def train(model: nn.Module, rank: int) -> dict[str, object]:
    """Groups, losses and metrics of three steps."""
    groups = parameter_groups(model, lr=0.01, gate_lr=0.1, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)
    hold_routing(model)
    said: list[dict[str, float]] = []
    for step in range(3):
        x = torch.randn(4, 3, *GRID, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        (loss + routing_loss(model)).backward()
        optimizer.step()
        end_step(model, step)
        said.append({"loss": loss.item(), **{name: value.item() for name, value in routing_metrics(model).items()}})
    return {"groups": {group["name"]: len(group["params"]) for group in groups}, "steps": said}


def refusals() -> list[str]:
    """What is said where parameters cannot be had."""
    model, said = flat(False, keeps=False), []
    for action in (
        lambda: parameter_groups(model, lr=0.1),
        lambda: end_step(model.module, 0),
        lambda: end_step(flat(True).module[0].module, 0),
    ):
        try:
            action()
        except SmoeError as error:
            said.append(str(error))
    end_step(model, 0)  # which has no need of groups
    return said


def of_process(rank: int) -> list[Any]:
    """Losses and metrics of each way, and what is refused."""
    return [{way: train(make(), rank) for way, make in WAYS.items()}, refusals()]
