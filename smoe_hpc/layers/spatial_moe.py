"""The Spatial Mixture-of-Experts layer (Dryden and Hoefler, NeurIPS 2022, section 3).

A gate selects K of N experts at every pixel; their outputs are concatenated. Experts are bias-free filters, as in a
convolution, but each pixel applies only the filters it selected. The gate learns by the routing classification loss,
which the layer forms inside its own backward: one backward pass, any number of layers. How the pieces meet:

    gate(x) -> values -> choice -> expert_conv2d -> [times values] -> attach_routing_loss -> output
                                                                               \\-> zero-valued scalar (see routing_loss)

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
O = K F output channels. Where samples have values and a choice of their own, these are [B, N, H, W] and [B, K, H, W].
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.compat import current_backward
from smoe_hpc.errors import CheckpointError, ConfigError, SmoeError
from smoe_hpc.kernels import PendingForward, RoutingLossMetrics, attach_routing_loss, expert_conv2d
from smoe_hpc.kernels.routing_loss.state import whole
from smoe_hpc.kernels.selection import EXPERT_ORDERS
from smoe_hpc.layers.convolutions.grid_layer import GridLayer, start_values
from smoe_hpc.layers.error_scale import ErrorScaledLayer
from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.gates.making import make_gate
from smoe_hpc.layers.gates.sharing import Together
from smoe_hpc.layers.moving import Move, autocast_type
from smoe_hpc.layers.rules import Damping, RoutingLoss, auxiliary_losses, refuse_other_losses, routing_loss_rules
from smoe_hpc.layers.scalars import Forward
from smoe_hpc.layers.tracing import refuse_script, refuse_tracing

_DEFAULTS = (RoutingLoss(), Damping())


class SpatialMoE2d(ErrorScaledLayer):
    """K of N experts at every pixel of a fixed grid; [B, C, H, W] -> [B, K F, H, W].

    Parameters: ``weight`` [N, F, C, k, k], and the gate's; for the latent gate ``gate.logits`` [N, H, W]. Output channel
    ``k * F + f`` of a pixel is filter f of its k-th selected expert.

    Backpropagate ``task_loss + routing_loss(model)`` (:func:`smoe_hpc.layers.routing_loss`), a zero that lets the gate's
    gradient follow the scale of the loss exactly; ``task_loss.backward()`` alone is enough where the loss is not scaled: the
    gates learn from it, and auxiliary losses take effect. Labels and damping are constants in second derivatives.

    Args:
        in_channels: C.
        num_experts: N.
        selected: K, at most N. K = N has neither routing loss nor damping: its gate learns from the task's loss if
            ``weighted``; else nothing uses it, and its parameters are frozen (``requires_grad`` False).
        grid: (H, W); the gate belongs to it. Rows in the order of latitude, columns of longitude.
        filters_per_expert: F.
        kernel_size: k, odd.
        padding: "zeros", "periodic_longitude" or "sphere"; see :func:`smoe_hpc.kernels.padding.pad`.
        gate: a kind ("latent", "conv", "coordconv", "coordconv_multi", "lcn", "linear") or a Gate, which layers may share.
        weighted: multiply each output by its gate value.
        expert_order: "rank", channel k is the k-th best expert (published); "id", ordered by number.
        routing_loss: how the gate learns; None: from the task's loss if ``weighted``, else not at all.
        damping: how much of the gradient wrong selections pass on to experts and input; None: all of it. Without a
            routing loss it needs a quantile of its own.
        generator: of the start values of weights and gate.

    Raises:
        ConfigError: invalid sizes or options, or a gate of other sizes.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        selected: int,
        grid: tuple[int, int],
        *,
        filters_per_expert: int = 1,
        kernel_size: int = 3,
        padding: str = "zeros",
        gate: str | Gate = "latent",
        weighted: bool = False,
        expert_order: str = "rank",
        routing_loss: RoutingLoss | None = _DEFAULTS[0],
        damping: Damping | None = _DEFAULTS[1],
        generator: torch.Generator | None = None,
    ) -> None:
        if not 1 <= selected <= num_experts:
            raise ConfigError(f"selected={selected} of num_experts={num_experts}: give a number from 1 to num_experts")
        if filters_per_expert < 1:
            raise ConfigError(f"filters_per_expert={filters_per_expert} must be at least 1")
        if expert_order not in EXPERT_ORDERS:
            raise ConfigError(f"expert_order={expert_order!r} is not known; choose one of {', '.join(EXPERT_ORDERS)}")
        super().__init__(in_channels, selected * filters_per_expert, grid, kernel_size=kernel_size, padding=padding)
        self.num_experts, self.selected, self.filters_per_expert = num_experts, selected, filters_per_expert
        self.weighted, self.expert_order = weighted, expert_order
        self.routing_loss, self.damping = routing_loss, damping
        shape = (num_experts, filters_per_expert, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(*shape))
        start_values(self.weight, self.fan_in, generator)
        if isinstance(gate, str):
            gate = make_gate(
                gate,
                num_experts,
                selected,
                self.grid,
                in_channels=in_channels,
                kernel_size=kernel_size,
                padding=padding,
                generator=generator,
                auxiliary=auxiliary_losses(routing_loss),
            )
        if (gate.num_experts, gate.selected, gate.grid) != (num_experts, selected, self.grid):
            raise ConfigError(
                f"the gate selects {gate.selected} of {gate.num_experts} experts on grid {gate.grid}, the layer needs "
                f"{selected} of {num_experts} on {self.grid}; share a gate only among layers of equal sizes"
            )
        refuse_other_losses(routing_loss, gate.auxiliary)
        self.gate = gate
        self._rules = routing_loss_rules(num_experts, selected, routing_loss, damping)
        error_scale = routing_loss.error_scale if routing_loss is not None and selected < num_experts else "none"
        if error_scale == "running_mean" and weighted:
            raise ConfigError(
                "error_scale='running_mean' with weighted=True: labels and damping look at different errors, which one "
                "running mean cannot scale; use error_scale='none' or weighted=False"
            )
        self.scale_errors(error_scale)
        self.metrics = RoutingLossMetrics(wants_errors=error_scale == "running_mean")
        self._forwards: list[tuple[weakref.ref[PendingForward], Together | None]] = []
        self._asked_before = False
        gate.be_used(weighted or self._rules.quantile is not None)

    @property
    def learns_routing(self) -> bool:
        """Whether a backward has a routing loss to form."""
        return self._rules.quantile is not None and any(p.requires_grad for p in self.gate.parameters())

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new filters and forget the mean of errors; the gate, which others may share, is reset on its own."""
        super().reset_parameters(generator)
        self.forget_errors()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each pixel its selected experts.

        Args:
            x: [B, C, H, W].

        Returns:
            [B, K F, H, W].

        Raises:
            ConfigError: another number of channels or another grid than the layer was made for, or a tracer that has no
                form for the layer (torch.jit, ONNX, torch.export under autocast).
        """
        refuse_tracing(x)
        self.check_input(x)
        values_NHW, auxiliary = self.gate(x)
        routing = self.gate.routing(values_NHW, self.expert_order)
        choice_KHW = routing.choice
        plan = routing.plan(autocast_type(x.device.type) or x.dtype, x.shape[0], self.weight.shape, self.padding)
        y_BOHW = expert_conv2d(x, self.weight, choice_KHW, padding=self.padding, plan=plan)
        learns = self.training and torch.is_grad_enabled()
        weights_OHW = before_BOHW = None
        if self.weighted:
            chosen_KHW = values_NHW.gather(-3, routing.indices)
            chosen_KHW = chosen_KHW if self._rules.quantile is None else chosen_KHW.detach()
            weights_OHW = chosen_KHW.repeat_interleave(self.filters_per_expert, -3).to(y_BOHW.dtype)
            # Where the gate learns from the task, damping must not reach it, so it comes before the weights.
            if not (learns and self._rules.quantile is None and self._rules.damping_quantile is not None):
                before_BOHW = y_BOHW.detach() if learns and self._rules.quantile is not None else None
                y_BOHW, weights_OHW = y_BOHW * weights_OHW, None
        if not learns:
            return y_BOHW
        return self._attach_routing_loss(y_BOHW, values_NHW, choice_KHW, before_BOHW, weights_OHW, auxiliary)

    # Backward writes to this object, which a compiled graph cannot do: torch.compile breaks the graph here, once a layer.
    @torch.compiler.disable
    def _attach_routing_loss(
        self,
        y_BOHW: Tensor,
        values_NHW: Tensor,
        choice_KHW: Tensor,
        before_BOHW: Tensor | None,
        weights_OHW: Tensor | None,
        auxiliary: Tensor | None,
    ) -> Tensor:
        self.gate.look_whether_stale(self.metrics)
        rules = self._rules
        if rules.quantile is None and rules.damping_quantile is None and auxiliary is None:
            return y_BOHW
        learns = rules.quantile is not None and values_NHW.requires_grad
        pending, together = PendingForward(self._asked_before), None
        recomputing = current_backward() != -1
        if recomputing:
            if not self.pending_forwards(done=True):
                raise SmoeError(
                    "SpatialMoE2d was recomputed by reentrant checkpointing, which loses the scale of the routing loss; "
                    "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
        else:
            self._asked_before = False
            if learns or auxiliary is not None:
                together = self.gate.sharing.join(self.metrics, pending)
        y_BOHW, _ = attach_routing_loss(
            y_BOHW,
            values_NHW if learns else None,
            choice_KHW,
            rules,
            filters=self.filters_per_expert,
            before_weighting=before_BOHW if learns else None,
            error_divisor=self.error_divisor(),
            metrics=self.metrics,
            collect=self.gate.collect,
            auxiliary=auxiliary,
            weights=weights_OHW,
            pending=pending,
            share=whole if together is None else together.share,
        )
        if not recomputing:
            alive = [forward for forward in self._forwards if forward[0]() is not None]
            self._forwards = [*alive, (weakref.ref(pending), together)]
        return y_BOHW

    def __prepare_scriptable__(self) -> None:
        refuse_script()

    def __getstate__(self) -> dict[str, Any]:
        """Without the forwards that wait for their backward: a copy (or a pickle) starts afresh."""
        metrics = replace(self.metrics, routing_loss=None, error_sum=None, error_count=None, with_scale=-1, without_scale=-1)
        return {**self.__dict__, "_forwards": [], "_asked_before": False, "metrics": metrics}

    def pending_forwards(self, done: bool = False) -> list[Forward]:
        """Forwards whose output is still there and whose backward has not come (or, with ``done``, has), oldest first."""
        known = [(forward(), together) for forward, together in self._forwards]
        return [Forward(one, together) for one, together in known if one is not None and (done or not one.done)]

    def ask_scalars(self) -> list[Forward]:
        """The same, for :func:`smoe_hpc.layers.routing_loss`; if there is none, the next forward knows that it was called."""
        forwards = self.pending_forwards()
        self._asked_before = not forwards and self.training and torch.is_grad_enabled()
        return forwards

    # -- moving, saving and loading ----------------------------------------------------------------------------------

    def _apply(self, fn: Move, recurse: bool = True) -> GridLayer:
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta != self.weight.is_meta:  # metrics of the other device mean nothing here
            self.metrics.take_errors()
            self.metrics.routing_loss = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        about = getattr(destination, "_metadata", {}).get(prefix[:-1])  # what torch keeps of a module beside its tensors
        if about is not None:
            about["expert_order"] = self.expert_order

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, about: dict[str, Any], *args: Any) -> None:
        order = about.get("expert_order", self.expert_order)  # older dicts, and those rebuilt by hand, do not say
        if order != self.expert_order:
            raise CheckpointError(
                f"layer {prefix[:-1]!r} has expert_order={self.expert_order!r}, its weights were trained with {order!r}, by "
                f"which channels lie otherwise: make the model with expert_order={order!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, about, *args)

    def check_input(self, x: Tensor) -> None:
        """Refuse an input of another shape; ConfigError says which the layer takes."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or tuple(x.shape[2:]) != self.grid:
            raise ConfigError(
                f"SpatialMoE2d was given shape {tuple(x.shape)} but takes [batch, {self.in_channels}, {self.grid[0]}, "
                f"{self.grid[1]}]; its gate belongs to that grid, so make a new layer or regrid the data"
            )

    def extra_repr(self) -> str:
        """Sizes, and the options that differ from the default."""
        options = f"{self.in_channels}, experts={self.num_experts}, selected={self.selected}, grid={self.grid}"
        if self.filters_per_expert > 1:
            options += f", filters_per_expert={self.filters_per_expert}"
        return f"{options}, order={self.expert_order}, weighted={self.weighted}, padding={self.padding!r}"


def spatial_layers(model: nn.Module) -> list[SpatialMoE2d]:
    """The SMoE layers of a model, each once, in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, SpatialMoE2d)]


def spatial_gates(model: nn.Module) -> list[tuple[Gate, list[SpatialMoE2d]]]:
    """The gates of a model, each once, with the layers that share it."""
    sharing: dict[int, tuple[Gate, list[SpatialMoE2d]]] = {}
    for layer in spatial_layers(model):
        sharing.setdefault(id(layer.gate), (layer.gate, []))[1].append(layer)
    return list(sharing.values())
