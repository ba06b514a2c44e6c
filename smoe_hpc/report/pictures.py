"""The pictures of a run: which there are, and where their figures come from.

    pictures/curves.png      loss, validation score, re-routing
    pictures/routing_L.png   what the routing of layer L learned, beside the true regions where they are known
    pictures/filters.png     filters of the first layer, beside the true stencils where they are known
    pictures/forecast.png    one forecast of the test split beside truth and error

Dimensions: B batch, C channels, H latitude rows, W longitude columns, K selected experts, N experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smoe_hpc.errors import CheckpointError
from smoe_hpc.files.regular import require_regular
from smoe_hpc.layers import LocallyConnected2d, SpatialMoE2d, spatial_layers
from smoe_hpc.report import curves, forecast, routing, style
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.runs.metrics import read_events
from smoe_hpc.scores import best_matching, confusion_matrix
from smoe_hpc.tasks import HeatTask, RegionalTask, StoreTask, make_task
from smoe_hpc.tasks.heat import routing_of

MOST_LAYERS = 4
"""Layers whose routing is drawn; the first ones of a deeper network."""


def make_pictures(run_dir: str | Path) -> list[Path]:
    """Draw the pictures of a run again from its recipe, data and exported weights; paths of what was drawn.

    A run that has not ended has no weights yet: of it only the learning curves are drawn.

    Raises:
        RunError: the folder is not a run.
        DataError: the data are gone.
        CheckpointError: weights of another model, or that are not what was written.
    """
    run = RunDirectory(Path(run_dir))
    task = make_task(run.recipe())
    if not run.weights.exists():
        return _draw_curves(task, run)
    require_regular(run.weights)
    run.check_weights()
    model = task.build_model()
    _load_weights(model, run.weights)
    return draw_pictures(task, run.path, model)


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        left = model.load_state_dict(load_file(path), strict=False)  # a gate that layers share is kept once
    except (SafetensorError, RuntimeError) as error:  # damaged, or shapes that differ
        raise CheckpointError(f"{path} does not fit the recipe beside it: {str(error).splitlines()[0]}") from error
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    wrong = [*(name for name in left.missing_keys if name not in aliases), *left.unexpected_keys]
    if wrong:
        names = ", ".join(wrong[:3])
        raise CheckpointError(f"{path} is of another model ({names}); train the run again under another name")


def draw_pictures(task: StoreTask, run_dir: Path, model: nn.Module) -> list[Path]:
    """Draw all pictures of a run into its folder of pictures; paths of what was drawn.

    Args:
        task: of the run.
        run_dir: the run's folder; its metrics are read.
        model: trained; left in the mode it was in.
    """
    run = RunDirectory(run_dir)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [
                *_draw_curves(task, run),
                *_draw_routings(task, run, model),
                *_draw_filters(task, run, model),
                *_draw_forecast(task, run, model),
            ]
    finally:
        model.train(training)


def _picture(run: RunDirectory, name: str) -> Path:
    return run.pictures / f"{name}.png"


def _draw_curves(task: StoreTask, run: RunDirectory) -> list[Path]:
    if not run.metrics.exists():
        return []
    score = "within_1pct" if isinstance(task, HeatTask) else task.selection.score
    unit = _unit(task) if score == "rmse" else ""
    made = curves.draw_curves(read_events(run.metrics), score, unit, f"{task.recipe.name}: learning curves")
    return [] if made is None else [style.save(made, _picture(run, "curves"))]


def _unit(task: StoreTask) -> str:
    samples = task.samples("train")
    index = samples.store.channel_indices(samples.target_channels[:1])[0]
    return samples.store.units[index]


def _sample(task: StoreTask, model: nn.Module) -> tuple[Tensor, Tensor, int]:
    """Inputs [1, C, H, W], targets and number of the sample that is shown, in the middle of the test split."""
    samples = task.samples("test")
    number = len(samples) // 2
    parameter = next(model.parameters())
    batch = samples.fetch([number]).to(parameter.device, parameter.dtype)
    return batch.inputs, batch.targets, number


def selections(model: nn.Module, inputs: Tensor) -> list[tuple[SpatialMoE2d, np.ndarray]]:
    """SMoE layers of a model and the experts [K, H, W] that each selects for one sample [1, C, H, W]."""
    found: dict[int, tuple[SpatialMoE2d, np.ndarray]] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, SpatialMoE2d)
        indices = routing_of(layer, arguments[0])
        found[id(layer)] = (layer, (indices[0] if indices.dim() == 4 else indices).cpu().numpy())

    layers = spatial_layers(model)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[id(layer)] for layer in layers if id(layer) in found]


def _draw_routings(task: StoreTask, run: RunDirectory, model: nn.Module) -> list[Path]:
    if not spatial_layers(model):
        return []
    region = task.region_map()
    drawn = []
    for number, (layer, indices) in enumerate(selections(model, _sample(task, model)[0])[:MOST_LAYERS]):
        name = f"{task.recipe.name}: routing of layer {number}"
        if layer.gate.depends_on_input:
            name += ", one sample"
        if region is not None and layer.selected == 1:
            made = routing.draw_routing_beside_regions(indices[0], region.numpy(), task.grid, layer.num_experts, name)
        else:
            if layer.selected > 1:
                name += f", {layer.selected} of {layer.num_experts} experts a cell"
            made = routing.draw_experts(indices, task.grid, layer.num_experts, name)
        drawn.append(style.save(made, _picture(run, f"routing_{number}")))
    return drawn


def _draw_filters(task: StoreTask, run: RunDirectory, model: nn.Module) -> list[Path]:
    layers = getattr(model, "layers", None)
    if not layers or isinstance(layers[0], LocallyConnected2d):  # whose filters are as many as there are cells
        return []
    layer = layers[0]
    weight = layer.weight.detach().float().cpu().numpy()
    weight = weight.reshape(-1, *weight.shape[-3:])  # experts and their filters in one row
    region = task.region_map()
    constants = task.samples("train").store.constants
    name = task.recipe.name
    alone = isinstance(layer, SpatialMoE2d) and layer.selected == layer.filters_per_expert == len(layers) == 1
    if alone and region is not None and "diffusivity" in constants and weight.shape[1:] == (1, 3, 3):
        assert isinstance(layer, SpatialMoE2d)
        (_, indices), *_ = selections(model, _sample(task, model)[0])
        matching = best_matching(confusion_matrix(indices[0], region.numpy(), layer.num_experts))
        stencils = routing.true_stencils(constants["diffusivity"], region.numpy())
        made = routing.draw_stencils(weight[:, 0], stencils, matching, f"{name}: learned filters beside the true ones")
    else:
        made = routing.draw_filters(weight, f"{name}: filters of the first layer")
    return [style.save(made, _picture(run, "filters"))]


def _draw_forecast(task: StoreTask, run: RunDirectory, model: nn.Module) -> list[Path]:
    inputs, targets, number = _sample(task, model)
    output, newest = model(inputs), task.newest()
    start = None if newest is None else inputs[:, newest]
    if isinstance(task, RegionalTask):
        output, targets = task.in_units(output), task.in_units(targets)
        start = None if start is None else task.in_units(start)
    samples = task.samples("test")
    channel = samples.target_channels[0]
    if isinstance(task, HeatTask):  # beside the true state, which is the last target
        targets, channel = targets[:, -1:], "heat"
    fields = [None if f is None else f[0, 0].double().cpu().numpy() for f in (start, targets, output)]
    title = f"{task.recipe.name}: {channel}, {_when(task, number)}"
    assert fields[1] is not None
    assert fields[2] is not None
    made = forecast.draw_forecast(fields[0], fields[1], fields[2], task.grid, _unit(task), title)
    return [style.save(made, _picture(run, "forecast"))]


def _when(task: StoreTask, number: int) -> str:
    """What a test sample's target is called."""
    samples = task.samples("test")
    coords, (inputs, targets, _) = samples.store.coords, samples.table.rows_of(np.array([number]))
    row = int(targets[0, 0])  # of several leads at once the first, which is the first channel
    if "time" in coords:
        time = coords["time"]
        lead = (time[row] - time[int(inputs[0, -1])]) // np.timedelta64(1, "h") + samples.window.inputs[-1]
        return f"{str(time[row])[:16].replace('T', ' ')} UTC, {lead} h ahead"
    return f"test run {int(coords['run'][row])}, step {int(coords['step'][row])}"
