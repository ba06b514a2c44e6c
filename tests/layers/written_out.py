"""A network of SMoE layers trained the long way: forward, backward for the errors, labels, a second backward."""

import torch
from torch import Tensor

from smoe_hpc.kernels import reference


def two_pass_gradients(layers: list, x: Tensor, target: Tensor, activation=torch.tanh) -> dict[str, Tensor]:
    """Gradients of task and routing loss for a chain of layers (MSE, no damping), by two backward passes and autograd.

    Returns names such as ``1.weight`` to gradients; gates that read the input read it detached.
    """
    h, outputs, values = x, [], []
    for layer in layers:
        v, _ = layer.gate(h)
        values.append(v)
        indices = layer.gate.routing(v, layer.expert_order).indices
        y = reference.expert_conv2d_loop(h, layer.weight, indices, padding=layer.padding)
        outputs.append((y, indices))
        h = y if layer is layers[-1] else activation(y)
    loss = (h - target).square().mean()
    errors = torch.autograd.grad(loss, [y for y, _ in outputs], retain_graph=True)
    routing = loss.new_zeros(())
    for layer, v, (_, indices), g in zip(layers, values, outputs, errors, strict=True):
        quantile = layer.routing_loss.quantile_for(layer.num_experts, layer.selected)
        correct = reference.correct_selections(
            g, quantile=quantile, tolerance=layer.routing_loss.tolerance, filters=layer.filters_per_expert
        )
        labels = reference.labels_of(correct, indices, layer.num_experts)
        routing = routing + reference.routing_loss(v, labels) / layer.gate.layers_sharing
    names = {f"{i}.{name}": p for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    grads = torch.autograd.grad(loss + routing, list(names.values()))
    return dict(zip(names, grads, strict=True))
