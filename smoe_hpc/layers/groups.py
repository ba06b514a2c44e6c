"""Parameter groups: experts and other kernels, biases, gates; each with what its kind needs."""

from __future__ import annotations

from typing import Any

from torch import nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.sharded import hides_parameters, summoned
from smoe_hpc.layers.spatial_moe import spatial_gates

GATE_EPS = 1e-15
"""Adam's eps for gates: their gradients (0.3 / (N H W), 2e-9 for 4096 experts on 128 x 256) lie far below the usual 1e-8."""


def parameter_groups(
    model: nn.Module, *, lr: float, gate_lr: float | None = None, weight_decay: float | None = None, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """Groups for an optimiser such as Adam.

    Args:
        model: any network.
        lr: of everything but gates.
        gate_lr: of gates; None takes ``lr``. Gates want a larger one in deep networks.
        weight_decay: of kernels alone (named ``weight``, two dimensions or more): biases, normalisations, the logits of a
            low-rank layer and gates do not decay. None: the optimiser's own, so that ``AdamW(parameter_groups(...),
            weight_decay=0.1)`` means what it says (without a word AdamW takes 0.01, Adam and SGD none).
        eps: of everything but gates, which have :data:`GATE_EPS`.

    Returns:
        Up to three groups "experts_and_kernels", "biases", "gates" (keys name, params, lr, eps, weight_decay, clip; gates
        are not to be clipped), each parameter in one; empty ones are left out. A group says nothing of what the optimiser
        is to decide.

    Raises:
        ConfigError: a model whose parameters FullyShardedDataParallel has made one flat tensor.
    """
    if hides_parameters(model):
        raise ConfigError(
            "FullyShardedDataParallel has made one flat tensor of all parameters, gates among them, which need groups of their "
            "own: give it use_orig_params=True, or use torch.distributed.fsdp.fully_shard"
        )
    of_gates = {id(p) for gate, _ in spatial_gates(model) for p in gate.parameters()}
    kernels: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    with summoned(model, *model.modules()):  # a cut parameter has one dimension, whatever it is a part of
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in of_gates:
                gates.append(parameter)
            else:
                decays = name.endswith("weight") and parameter.dim() > 1
                (kernels if decays else biases).append(parameter)
    common: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": 0.0, "clip": True}
    of_kernels = {key: value for key, value in common.items() if key != "weight_decay"}
    if weight_decay is not None:
        of_kernels["weight_decay"] = weight_decay
    groups: list[dict[str, Any]] = [
        {**of_kernels, "name": "experts_and_kernels", "params": kernels},
        {**common, "name": "biases", "params": biases},
        {**common, "name": "gates", "params": gates, "lr": lr if gate_lr is None else gate_lr, "eps": GATE_EPS, "clip": False},
    ]
    return [group for group in groups if group["params"]]
