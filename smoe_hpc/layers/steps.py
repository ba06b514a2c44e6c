"""What a training loop does with a model that has layers of ours, besides what it does with any model.

    begin_step(model, step, positions)                 # noise and dropout follow the step and the samples
    loss = task_loss(model(x), y) + routing_loss(model)
    loss.backward(); optimizer.step()
    end_step(model, step)                              # routing and running statistics are renewed

All of it does nothing for a model without such layers.

Dimensions: B batch, H latitude rows, W longitude columns, K selected.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.kernels import Routing
from smoe_hpc.layers.dropout import begin_dropout
from smoe_hpc.layers.ghost_batch_norm import renew_running_statistics
from smoe_hpc.layers.spatial_moe import spatial_gates, spatial_layers


def hold_routing(model: nn.Module) -> None:
    """Hold the present choice where none is held, before the first step of a training that renews it with a delay or not
    every step: its first steps then use one choice too.
    """
    for gate, layers in spatial_gates(model):
        if not gate.per_sample and not gate.held:
            for order in sorted({layer.expert_order for layer in layers}):
                gate.renew(order, 0)


def routing_loss(model: nn.Module) -> Tensor:
    """A zero to add to the task's loss before ``backward``; through it the gates learn at the scale of that loss.

    Scale the sum, not the task's loss alone: ``((task + routing_loss(model)) / accumulation).backward()``. Its value is
    that of the auxiliary losses, 0 where there are none. The routing classification loss itself, which is known only after
    backward, is in :func:`routing_metrics`.

    Returns:
        0-d; a plain zero where the model has no SMoE layer or none ran since the last call.
    """
    scalars: list[Tensor] = []
    for gate, layers in spatial_gates(model):
        gate.layers_sharing = len(layers)
        scalars += [scalar for layer in layers for scalar in layer.take_scalars()]
    if not scalars:
        anchor = next(model.parameters(), None)
        return torch.zeros((), device=None if anchor is None else anchor.device)
    if len(scalars) == 1:
        return scalars[0]
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).sum()


def begin_step(model: nn.Module, step: int, samples: Tensor | None = None) -> None:
    """Tell gates and dropout where training stands, so that what they draw is a function of the step and the samples.

    Args:
        model: any network.
        step: number of the step, from 0.
        samples: [B] int64, this process's positions in the step's global batch; needed for per-sample noise and for
            dropout when several processes share a batch.
    """
    begin_dropout(model, step, samples)
    for gate, layers in spatial_gates(model):
        gate.step, gate.samples, gate.layers_sharing = step, samples, len(layers)


def end_step(model: nn.Module, step: int, group: Any = None, refresh: int = 1, delay: int = 0) -> None:
    """Renew the routing, and the running statistics of ghost batch normalisation, after an optimiser step. Collective over
    ``group``.

    Args:
        model: any network, whose parameters are equal on all ranks.
        step: number of the step that was just made.
        group: processes that share a batch; None: all, where torch.distributed runs.
        refresh: renew every so many steps.
        delay: 0: the next step uses the new choice; 1: the one after it.

    Raises:
        ConfigError: ``refresh`` below 1 or ``delay`` neither 0 nor 1.
    """
    if refresh < 1 or delay not in (0, 1):
        raise ConfigError(f"routing refresh={refresh}, delay={delay}: refresh is at least 1, delay 0 or 1")
    _share_running_errors(model, group)
    renew_running_statistics(model, group)
    if (step + 1) % refresh:
        return
    for gate, layers in spatial_gates(model):
        if gate.per_sample or not model.training:
            continue
        gate.step = step + 1
        for order in sorted({layer.expert_order for layer in layers}):
            gate.renew(order, delay)


def _share_running_errors(model: nn.Module, group: Any) -> None:
    for layer in spatial_layers(model):
        if layer.running_error is None:
            continue
        total, count = layer.metrics.take_errors()
        if total is None:
            continue
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            both = torch.cat([total.flatten().double(), total.new_tensor([count]).double()])
            dist.all_reduce(both, group=group)
            total, count = both[:-1].view_as(total), int(both[-1])
        layer.update_running_error(total, count)


def release_routing(model: nn.Module) -> None:
    """Hold no routing: each forward selects from the gates as they are. Undoes :func:`end_step`."""
    for gate, _ in spatial_gates(model):
        gate.release()


def routing_metrics(model: nn.Module) -> dict[str, Tensor]:
    """What the last step said about routing; 0-d tensors of this process, none of them read back from the device.

    Returns:
        ``routing_loss``: summed over gates (mean over the layers that share one). Where a gate's choice is state, also
        ``selections_changed``: share of selections that the last renewal replaced, and ``load_min`` / ``load_max``: share
        of the selections of the least / most used expert, times N, over all gates (1 is an even load).
    """
    losses: list[Tensor] = []
    changed: list[Tensor] = []
    loads: list[Tensor] = []
    for gate, layers in spatial_gates(model):
        own = [layer.metrics.routing_loss for layer in layers if layer.metrics.routing_loss is not None]
        losses += [torch.stack(own).mean()] if own else []
        of_gate = gate.changed()
        changed += [of_gate] if of_gate is not None else []
        loads += [held.load() * held.num_experts for held in list(gate.held.values())[:1]]
    metrics: dict[str, Tensor] = {}
    if losses:
        metrics["routing_loss"] = torch.stack(losses).sum()
    if changed:
        metrics["selections_changed"] = torch.stack(changed).mean()
    if loads:
        every = torch.cat(loads)
        metrics["load_min"], metrics["load_max"] = every.min(), every.max()
    return metrics


def routing_state(model: nn.Module) -> dict[str, Tensor]:
    """The held choices, which a checkpoint keeps beside parameters and buffers; names to int64 tensors [K, H, W].

    With ``refresh`` above 1 or a ``delay`` they do not follow from the parameters.
    """
    state: dict[str, Tensor] = {}
    for number, (gate, _) in enumerate(spatial_gates(model)):
        for kind in ("held", "waiting"):
            for order, routing in getattr(gate, kind).items():
                state[f"gate{number}.{kind}.{order}"] = routing.indices
    return state


def load_routing_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take up choices that :func:`routing_state` gave for a model of the same make.

    Raises:
        SmoeError: a choice for a gate that the model does not have, or of another shape.
    """
    release_routing(model)
    gates = [gate for gate, _ in spatial_gates(model)]
    for name, indices in state.items():
        number, kind, order = name.split(".")
        position = int(number.removeprefix("gate"))
        if position >= len(gates) or indices.shape[-2:] != gates[position].grid:
            raise SmoeError(f"routing state {name!r} {tuple(indices.shape)} does not fit the model; use its own recipe")
        gate = gates[position]
        device = next((p.device for p in gate.parameters()), indices.device)
        getattr(gate, kind)[order] = Routing(indices.to(device), gate.num_experts)
