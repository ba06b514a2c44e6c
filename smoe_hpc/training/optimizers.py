"""The optimiser of a recipe, and the names under which its state is kept.

torch's own optimisers. Adam in its fused form: one pass over each tensor, on CPU and GPU, a third of the time that a small
model needs otherwise. Parameters keep their own state tensors, so a checkpoint can name each by its parameter.
"""

from __future__ import annotations

import torch
from torch import nn

from smoe_hpc.config import Optimizer
from smoe_hpc.layers import parameter_groups


def make_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.Optimizer:
    """Optimiser over the model's parameter groups (experts and kernels, biases, gates)."""
    groups = parameter_groups(model, lr=recipe.lr, gate_lr=recipe.gate_lr, weight_decay=recipe.weight_decay, eps=recipe.eps)
    if recipe.kind == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.betas[0], foreach=True)
    return torch.optim.Adam(groups, lr=recipe.lr, betas=(recipe.betas[0], recipe.betas[1]), fused=True)


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """State that the optimiser keeps for each parameter, in the parameter's shape."""
    if isinstance(optimizer, torch.optim.Adam):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def state_of_step(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, step: int, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """State entry of one parameter after ``step`` steps, with its tensors on the parameter's device."""
    entry = {name: tensor.to(parameter) for name, tensor in state.items()}
    if isinstance(optimizer, torch.optim.Adam):
        entry["step"] = torch.tensor(float(step), device=parameter.device)  # where the fused form wants it
    return entry
