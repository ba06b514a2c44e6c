"""A network of SMoE layers trained the long way: forward, backward for the errors, labels, a second backward."""

import torch
from torch import Tensor

from smoe_hpc.kernels import reference


def two_pass_gradients(layers: list, x: Tensor, target: Tensor, activation=torch.tanh) -> dict[str, Tensor]:
    """Gradients of task and routing loss for a chain of layers (MSE, no damping), by two backward passes and autograd.

    Returns names such as ``1.weight`` to gradients; gates that read the input read it detached.
    """
    sharing = [sum(other.gate is layer.gate for other in layers) for layer in layers]
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
    for layer, v, (_, indices), g, together in zip(layers, values, outputs, errors, sharing, strict=True):
        quantile = layer.routing_loss.quantile_for(layer.num_experts, layer.selected)
        correct = reference.correct_selections(
            g, quantile=quantile, tolerance=layer.routing_loss.tolerance, filters=layer.filters_per_expert
        )
        labels = reference.labels_of(correct, indices, layer.num_experts)
        routing = routing + reference.routing_loss(v, labels) / together
    names = {f"{i}.{name}": p for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    grads = torch.autograd.grad(loss + routing, list(names.values()))
    return dict(zip(names, grads, strict=True))


class _LabelAndDamp(torch.autograd.Function):
    """The identity; the first gradient that comes back decides who is correct and who is damped."""

    @staticmethod
    def forward(ctx, out, layer, unweighted, found):
        ctx.layer, ctx.unweighted, ctx.found = layer, unweighted, found
        return out.clone()

    @staticmethod
    def backward(ctx, g):
        layer, found = ctx.layer, ctx.found
        if not found:
            filters, routing, damping = layer.filters_per_expert, layer.routing_loss, layer.damping
            quantile = routing.quantile_for(layer.num_experts, layer.selected) if routing else None
            if routing:
                seen = g.detach() * ctx.unweighted if layer.weighted else g.detach()
                found["correct"] = reference.correct_selections(
                    seen, quantile=quantile, tolerance=routing.tolerance, filters=filters
                )
            kept = torch.ones((), dtype=torch.bool)
            if damping:
                quantile = quantile if damping.quantile is None else damping.quantile
                kept = reference.correct_selections(
                    g.detach(), quantile=quantile, tolerance=damping.tolerance, filters=filters
                ).repeat_interleave(filters, 1)
            found["factors"] = torch.ones_like(g).masked_fill(~kept, damping.factor if damping else 1.0)
        return g, None, None, None


class _Damp(torch.autograd.Function):
    """The identity, whose gradient is multiplied with what was found, whatever its order."""

    @staticmethod
    def forward(ctx, y, found):
        ctx.found = found
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.found["factors"], None


class WrittenOut:
    """A chain of layers as one loss of ordinary operations, in which labels and damping are constants: those of a first
    backward of ``task(output)``. Every derivative of :meth:`loss` is autograd's own."""

    def __init__(self, layers: list, x: Tensor, task, activation=torch.tanh) -> None:
        self.layers, self.task, self.activation = layers, task, activation
        self.found: list[dict] = [{} for _ in layers]
        parameters = [p for layer in layers for p in layer.parameters()]
        torch.autograd.grad(self.loss(x.detach(), routing=False), parameters, allow_unused=True)
        assert all(self.found)

    def loss(self, x: Tensor, routing: bool = True) -> Tensor:
        """Task's loss, and with ``routing`` the routing losses, 0-d."""
        classified = x.new_zeros(())
        for layer, found in zip(self.layers, self.found, strict=True):
            v, _ = layer.gate(x)
            indices = layer.gate.routing(v, layer.expert_order).indices
            y = reference.expert_conv2d_loop(x, layer.weight, indices, padding=layer.padding)
            before, y = y.detach(), _Damp.apply(y, found)
            if layer.weighted:
                weights = v.gather(-3, indices).repeat_interleave(layer.filters_per_expert, -3)
                y = y * (weights if layer.routing_loss is None else weights.detach())
            y = _LabelAndDamp.apply(y, layer, before, found)
            if routing and layer.routing_loss:
                together = sum(other.gate is layer.gate for other in self.layers)
                labels = reference.labels_of(found["correct"], indices, layer.num_experts)
                classified = classified + reference.routing_loss(v, labels) / together
            x = y if layer is self.layers[-1] else self.activation(y)
        return self.task(x) + classified
