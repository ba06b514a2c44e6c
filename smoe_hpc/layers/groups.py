"""Parameter groups: experts and other kernels, biases, gates; each with what its kind needs."""

from __future__ import annotations

from typing import Any

from torch import nn

from smoe_hpc.layers.spatial_moe import spatial_gates

GATE_EPS = 1e-15
"""Adam's eps for gates: their gradients (0.3 / (N H W), 2e-9 for 4096 experts on 128 x 256) lie far below the usual 1e-8."""


def parameter_groups(
    model: nn.Module, *, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """Groups for an optimiser such as Adam.

    Args:
        model: any network.
        lr: of everything but gates.
        gate_lr: of gates; None takes ``lr``. Gates want a larger one in deep networks.
        weight_decay: of kernels alone (named ``weight``, two dimensions or more): biases, normalisations, the logits of a
            low-rank layer and gates do not decay.
        eps: of everything but gates, which have :data:`GATE_EPS`.

    Returns:
        Up to three groups "experts_and_kernels", "biases", "gates" (keys name, params, lr, eps, weight_decay, clip; gates
        are not to be clipped), each parameter in one; empty ones are left out.
    """
    of_gates = {id(p) for gate, _ in spatial_gates(model) for p in gate.parameters()}
    kernels: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in of_gates:
            gates.append(parameter)
        else:
            decays = name.endswith("weight") and parameter.dim() > 1
            (kernels if decays else biases).append(parameter)
    common = {"lr": lr, "eps": eps, "weight_decay": 0.0, "clip": True}
    groups: list[dict[str, Any]] = [
        {**common, "name": "experts_and_kernels", "params": kernels, "weight_decay": weight_decay},
        {**common, "name": "biases", "params": biases},
        {**common, "name": "gates", "params": gates, "lr": lr if gate_lr is None else gate_lr, "eps": GATE_EPS, "clip": False},
    ]
    return [group for group in groups if group["params"]]
