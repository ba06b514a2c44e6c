"""What a training loop does with a model that has layers of ours, besides what it does with any model.

    begin_step(model, step, samples)                   # noise and dropout follow the step and the samples
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
from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.ghost_batch_norm import renew_running_statistics
from smoe_hpc.layers.scalars import add_up
from smoe_hpc.layers.sharded import summoned
from smoe_hpc.layers.spatial_moe import SpatialMoE2d, spatial_gates, spatial_layers


def hold_routing(model: nn.Module) -> None:
    """Hold the present choice where none is held, before the first step of a training that renews it with a delay or not
    every step: its first steps then use one choice too.
    """
    unheld = []
    for number, pair in enumerate(spatial_gates(model)):
        gate = pair[0]
        if not gate.per_sample and not gate.held:
            if gate.step is None:
                gate.step, gate.number = 0, number
            unheld.append(pair)
    _renew(model, unheld, 0)


def _renew(model: nn.Module, gates: list[tuple[Gate, list[SpatialMoE2d]]], delay: int) -> None:
    """Hold the choice of the present parameters in these gates of the model."""
    with summoned(model, *(gate for gate, _ in gates)):
        for gate, layers in gates:
            for order in sorted({layer.expert_order for layer in layers}):
                try:
                    gate.renew(order, delay)
                except SmoeError as error:
                    name = next((name for name, module in model.named_modules() if module is gate), "")
                    raise SmoeError(f"gate {name!r}: {error}") from error


def routing_loss(model: nn.Module) -> Tensor:
    """A zero to add to the task's loss before ``backward``; through it the gates learn at the scale of that loss.

    Scale the sum, not the task's loss alone: ``((task + routing_loss(model)) / accumulation).backward()``. The size of that
    scale counts, not its sign. The value is that of the auxiliary losses, 0 where there are none. The routing classification
    loss itself, which is known only after backward, is in :func:`routing_metrics`.

    It is of all forwards whose output still exists and whose backward has not come: each has a scalar of its own. A backward
    that keeps its graph (``retain_graph``, ``create_graph``) does not end the wait. Reading is repeatable until the backward,
    say to log it, but add it to a loss once. Ask after the forward. (Of forwards of several graphs, say two batches, it takes
    effect where gradients of leaves are asked for, with each output that is in the loss.) In a backward that takes second
    derivatives (after ``create_graph``) gates learn, and auxiliary losses act, by this sum alone.

    Returns:
        0-d; zero, outside any graph, where no forward waits for its backward.

    Raises:
        SmoeError: in backward, if it was added twice, or called before the forward (of some layer) had run.
    """
    layers = spatial_layers(model)
    forwards = [forward for layer in layers for forward in layer.ask_scalars()]
    if not forwards:
        anchor = next(model.parameters(), None)
        return torch.zeros((), device=None if anchor is None else anchor.device)
    return add_up(forwards, [layer.metrics for layer in layers])


def begin_step(model: nn.Module, step: int, samples: Tensor | None = None) -> None:
    """Tell gates and dropout where training stands, so that what they draw is a function of the step and the samples.

    Args:
        model: any network.
        step: number of the step, from 0.
        samples: [B] int64, this process's positions in the step's global batch; needed for per-sample noise and for
            dropout when several processes share a batch.
    """
    begin_dropout(model, step, samples)
    for number, (gate, _) in enumerate(spatial_gates(model)):
        gate.step, gate.samples, gate.number = step, samples, number


def end_step(model: nn.Module, step: int, group: Any = None, refresh: int = 1, delay: int = 0) -> None:
    """Renew the routing, and the running statistics of ghost batch normalisation, after an optimiser step. Collective over
    ``group``.

    Args:
        model: any network, whose parameters are equal on all ranks, or spread over them by ``fully_shard`` or
            ``FullyShardedDataParallel`` (what these return, not a part of it).
        step: number of the step that was just made.
        group: processes that share a batch; None: all, where torch.distributed runs.
        refresh: renew every so many steps.
        delay: 0: the next step uses the new choice; 1: the one after it.

    Raises:
        ConfigError: ``refresh`` below 1 or ``delay`` neither 0 nor 1.
        SmoeError: on a CPU, a gate that holds a NaN (on a GPU the next forward in evaluation says so, since looking waits
            for the device); or parameters of which FSDP shows only a part.
    """
    if refresh < 1 or delay not in (0, 1):
        raise ConfigError(f"routing refresh={refresh}, delay={delay}: refresh is at least 1, delay 0 or 1")
    for layer in spatial_layers(model):
        if layer.learns_routing and layer.metrics.routing_loss is None:  # every process has the same metrics to add up
            layer.metrics.routing_loss = torch.zeros((), device=layer.weight.device)
    _share_running_errors(model, group)
    renew_running_statistics(model, group)
    chosen = []
    for number, pair in enumerate(spatial_gates(model)):
        gate = pair[0]
        if model.training:
            gate.note_parameters()
        if (step + 1) % refresh == 0 and model.training and not gate.per_sample:
            gate.step, gate.number = step + 1, number
            chosen.append(pair)
    _renew(model, chosen, delay)


def _share_running_errors(model: nn.Module, group: Any) -> None:
    """One reduction over the errors of all layers that keep them, whichever of them this process ran."""
    layers = [layer for layer in spatial_layers(model) if layer.running_error is not None]
    if not layers:
        return
    taken = [layer.metrics.take_errors() for layer in layers]
    if not (dist.is_initialized() and dist.get_world_size(group) > 1):
        for layer, (total, count) in zip(layers, taken, strict=True):
            if total is not None and count is not None:
                layer.update_running_error(total, count)
        return
    # Zeros where nothing ran: with only what ran, processes that ran different layers would add errors of one to another's.
    assert layers[0].running_error is not None
    device = layers[0].running_error.device
    parts = [_errors_and_count(layer, *sums) for layer, sums in zip(layers, taken, strict=True)]
    summed = torch.cat([part.to(device) for part in parts])
    dist.all_reduce(summed, group=group)
    for layer, part in zip(layers, summed.split([len(part) for part in parts]), strict=True):
        layer.update_running_error(part[:-1].view(layer.grid), part[-1])


def _errors_and_count(layer: SpatialMoE2d, total: Tensor | None, count: Tensor | None) -> Tensor:
    """[H W + 1] float64: the sum of the errors at each pixel, and of how many."""
    assert layer.running_error is not None
    sums = layer.running_error.new_zeros(layer.grid[0] * layer.grid[1] + 1, dtype=torch.float64)
    if total is not None and count is not None:
        sums[:-1] = total.flatten()
        sums[-1] = count
    return sums


def release_routing(model: nn.Module) -> None:
    """Hold no routing: each forward selects from the gates as they are. Undoes :func:`end_step`."""
    for gate, _ in spatial_gates(model):
        gate.release()


def routing_metrics(model: nn.Module) -> dict[str, Tensor]:
    """What the last step said about routing; 0-d tensors of this process, none of them read back from the device.

    Returns:
        ``routing_loss``: summed over gates (mean over the layers that share one; of layers that have not run yet, 0 from
        the first :func:`end_step` on, so that all processes have the same names). Where a gate's choice is state, also
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
        index = int(number.removeprefix("gate"))
        if index >= len(gates) or indices.shape[-2:] != gates[index].grid:
            raise SmoeError(f"routing state {name!r} {tuple(indices.shape)} does not fit the model; use its own recipe")
        gate = gates[index]
        device = next((p.device for p in gate.parameters()), indices.device)
        getattr(gate, kind)[order] = Routing(indices.to(device), gate.num_experts)
