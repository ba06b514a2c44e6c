"""Which modules of a model a forward pass calls, how often and on which grids.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.layers.replacing.report import Grid


def watch(model: nn.Module, modules: Iterable[nn.Module], example_input: Any) -> dict[int, list[Grid]]:
    """Run the model once, in evaluation and without gradients, and watch some modules.

    Args:
        model: any network; training modes, and with them the buffers of normalisations, are left as they were found.
        modules: any, in the model or not, whose outputs are [..., H, W].
        example_input: a tensor, or a tuple of arguments, as the model takes.

    Returns:
        {id of a module: (H, W) of each of its outputs, in the order of the calls}.
    """
    calls: dict[int, list[Grid]] = {}
    hooks = []

    def note(grids: list[Grid]) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: grids.append((int(output.shape[-2]), int(output.shape[-1])))

    modes = [(module, module.training) for module in model.modules()]
    for module in modules:
        hooks.append(module.register_forward_hook(note(calls.setdefault(id(module), []))))
    try:
        model.eval()  # so that batch normalisation keeps its statistics
        with torch.no_grad():
            model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return calls


def find_grids(model: nn.Module, example_input: Any) -> dict[str, set[Grid]]:
    """Grids on which each ``torch.nn.Conv2d`` of the model works, found by one forward pass without gradients.

    Args:
        model: any network; its training mode, buffers included, is left as it was found.
        example_input: a tensor, or a tuple of arguments, as the model takes.

    Returns:
        {module name: {(H, W) of the output, ...}}; a layer that never ran has none.
    """
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    calls = watch(model, convolutions.values(), example_input)
    return {name: set(calls[id(module)]) for name, module in convolutions.items()}
