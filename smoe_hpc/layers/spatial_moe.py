"""The Spatial Mixture-of-Experts layer (Dryden and Hoefler, NeurIPS 2022, section 3).

A gate selects K of N experts at every pixel; their outputs are concatenated. Experts are bias-free filters, as in a
convolution, but each pixel applies only the filters it selected. The gate learns by the routing classification loss,
which the layer forms inside its own backward: one backward pass, any number of layers. How the pieces meet:

    gate(x) -> values -> choice -> expert_conv2d -> [times values] -> route_signal -> output
                                                                          \\-> zero-valued scalar (see routing_loss)

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.kernels import Routing, SignalMetrics, SignalRules, expert_conv2d, route_signal
from smoe_hpc.kernels.routing import EXPERT_ORDERS
from smoe_hpc.layers.convolution import GridLayer, start_values
from smoe_hpc.layers.gates import Gate
from smoe_hpc.layers.input_gates import make_gate
from smoe_hpc.layers.rules import Damping, RoutingLoss

_MOST_WAITING = 64  # forwards without a backward after which their graphs are let go
_ERROR_MEMORY = 0.99  # share of the running mean of the error that a step keeps
_DEFAULTS = (RoutingLoss(), Damping())


class SpatialMoE2d(GridLayer):
    """K of N experts at every pixel of a fixed grid; [B, C, H, W] -> [B, K F, H, W].

    Parameters: ``weight`` [N, F, C, k, k], and the gate's; for the latent gate ``gate.logits`` [N, H, W]. Output channel
    ``k * F + f`` of a pixel is filter f of its k-th selected expert.

    Backpropagate ``task_loss + routing_loss(model)`` (:func:`smoe_hpc.layers.routing_loss`), a zero that lets the gate's
    gradient follow the scale of the loss exactly; plain ``task_loss.backward()`` serves where the loss is not scaled.

    Args:
        in_channels: C.
        num_experts: N.
        selected: K, at most N. K = N has neither routing loss nor damping.
        grid: (H, W); the gate belongs to it. Rows in the order of latitude, columns of longitude.
        filters_per_expert: F.
        kernel_size: k, odd.
        padding: "zeros", "periodic_longitude" or "sphere"; see :func:`smoe_hpc.kernels.padding.pad`.
        gate: a kind ("latent", "conv", "coordconv", "coordconv-multi", "lcn", "linear") or a Gate, which layers may share.
        weighted: multiply each output by its gate value.
        expert_order: "rank", channel k is the k-th best expert (published); "id", ordered by number.
        routing_loss: how the gate learns; None: from the task's loss if ``weighted``, else not at all.
        damping: what wrong selections pass on; None: everything. Without a routing loss it needs a quantile of its own.
        generator: of the start values of weights and gate.

    Raises:
        ConfigError: sizes or options that cannot be, or a gate of other sizes.
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
        self.weight = start_values(*shape, fan_in=in_channels * kernel_size**2, generator=generator)
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
            )
        if (gate.num_experts, gate.selected, gate.grid) != (num_experts, selected, self.grid):
            raise ConfigError(
                f"the gate selects {gate.selected} of {gate.num_experts} experts on grid {gate.grid}, the layer needs "
                f"{selected} of {num_experts} on {self.grid}; share a gate only among layers of equal sizes"
            )
        self.gate = gate
        self._rules = self._make_rules()
        self._scale_needs = routing_loss.error_scale if routing_loss is not None and selected < num_experts else "none"
        if self._scale_needs == "running_mean" and weighted:
            raise ConfigError(
                "error_scale='running_mean' with weighted=True: labels and damping look at different errors, which one "
                "running mean cannot scale; use error_scale='none' or weighted=False"
            )
        self.loss_weight: Tensor | None
        self.running_error: Tensor | None
        self.register_buffer("loss_weight", None, persistent=False)
        tracked = torch.zeros(self.grid) if self._scale_needs == "running_mean" else None
        self.register_buffer("running_error", tracked)
        self.running_steps: Tensor | None
        steps = torch.zeros((), dtype=torch.int64) if tracked is not None else None
        self.register_buffer("running_steps", steps)
        self.metrics = SignalMetrics(wants_errors=tracked is not None)
        self._scalars: list[Tensor] = []
        gate.layers_sharing += 1  # last: a layer that could not be made does not share

    def _make_rules(self) -> SignalRules:
        if self.selected == self.num_experts:
            return SignalRules(quantile=None)
        quantile = None
        if self.routing_loss is not None:
            quantile = self.routing_loss.quantile_for(self.num_experts, self.selected)
        if self.damping is None or self.damping.factor == 1.0:
            return SignalRules(quantile, self.routing_loss.tolerance if self.routing_loss else 0.0)
        damping_quantile = self.damping.quantile if self.damping.quantile is not None else quantile
        if damping_quantile is None and self.damping != _DEFAULTS[1]:
            raise ConfigError("damping without a routing loss needs a quantile of its own, e.g. Damping(quantile=0.7)")
        return SignalRules(
            quantile=quantile,
            tolerance=self.routing_loss.tolerance if self.routing_loss else 0.0,
            damping_quantile=damping_quantile,
            damping_tolerance=self.damping.tolerance,
            damping_factor=self.damping.factor,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each pixel its selected experts.

        Args:
            x: [B, C, H, W].

        Returns:
            [B, K F, H, W].

        Raises:
            ConfigError: another number of channels or another grid than the layer was made for.
        """
        self.check_input(x)
        values, auxiliary = self.gate(x)
        routing = self.gate.routing(values, self.expert_order)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        plan = routing.plan(dtype, x.shape[0], self.weight.shape, self.padding)
        y = expert_conv2d(x, self.weight, routing.choice, padding=self.padding, plan=plan)
        unweighted = y
        if self.weighted:
            chosen = values.gather(-3, routing.indices)
            chosen = chosen if self.routing_loss is None else chosen.detach()
            y = y * chosen.repeat_interleave(self.filters_per_expert, -3).to(y.dtype)
        if self.training and torch.is_grad_enabled():
            y = self._with_signal(y, values, routing, unweighted.detach() if self.weighted else None, auxiliary)
        return y

    # Backward leaves its marks on this object, which a compiled graph cannot: torch.compile breaks off here, once a layer.
    @torch.compiler.disable
    def _with_signal(
        self, y: Tensor, values: Tensor, routing: Routing, before_weighting: Tensor | None, auxiliary: Tensor | None
    ) -> Tensor:
        rules = self._rules
        if rules.quantile is None and rules.damping_quantile is None and auxiliary is None:
            return y
        rules = replace(rules, gate_share=1.0 / max(self.gate.layers_sharing, 1))
        learns = rules.quantile is not None and values.requires_grad
        y, scalar = route_signal(
            y,
            values if learns else None,
            routing.choice,
            rules,
            filters=self.filters_per_expert,
            before_weighting=before_weighting if learns else None,
            error_divisor=self._error_divisor(),
            metrics=self.metrics,
            collect=self.gate.collect,
        )
        recomputing = torch._C._current_graph_task_id() != -1
        if recomputing:
            if self.metrics.awaiting == 0:
                raise SmoeError(
                    "SpatialMoE2d was recomputed by reentrant checkpointing, which loses the scale of the routing loss; "
                    "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
        else:
            self._remember(scalar if auxiliary is None else scalar + auxiliary)
        return y

    def _remember(self, scalar: Tensor) -> None:
        """Keep the scalar for :func:`routing_loss`; graphs whose backward is done, or never comes, are let go."""
        if self.metrics.awaiting == 0:
            self._scalars.clear()
        elif self.metrics.awaiting >= _MOST_WAITING:
            warnings.warn(
                f"SpatialMoE2d ran forward {self.metrics.awaiting} times in training mode without a backward; their "
                "graphs are dropped. Use model.eval() or torch.no_grad() where nothing is to be learned",
                stacklevel=4,
            )
            self._scalars.clear()
            self.metrics.awaiting = 0
        self._scalars.append(scalar)
        self.metrics.awaiting += 1

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs of forwards that wait for their backward: a copy (or a pickle) starts afresh."""
        metrics = replace(self.metrics, awaiting=0, routing_loss=None, error_sum=None, error_count=0)
        return {**self.__dict__, "_scalars": [], "metrics": metrics}

    def take_scalars(self) -> list[Tensor]:
        """The scalars since the last call, each 0-d, which start again from none; see :func:`routing_loss`."""
        taken, self._scalars = self._scalars, []
        return taken

    # -- error scale -------------------------------------------------------------------------------------------------

    def set_loss_weight(self, weight: Tensor) -> None:
        """Tell the layer the weight [H, W] that the task's loss gives each pixel, for ``error_scale="loss_weight"``.

        Raises:
            ConfigError: another grid, or a weight that is not positive.
        """
        if tuple(weight.shape) != self.grid or not bool((weight > 0).all()):
            raise ConfigError(f"loss weight {tuple(weight.shape)} must be positive on the layer's grid {self.grid}")
        self.loss_weight = weight.detach().to(self.weight.device, torch.float32)

    def _error_divisor(self) -> Tensor | None:
        if self._scale_needs == "loss_weight":
            if self.loss_weight is None:
                raise ConfigError("error_scale='loss_weight' but the layer knows no weight; call set_loss_weight first")
            return self.loss_weight
        if self._scale_needs == "running_mean":
            assert self.running_error is not None
            assert self.running_steps is not None
            tiny = torch.finfo(torch.float32).tiny
            mean = self.running_error.clamp_min(tiny)
            return torch.where(self.running_steps > 0, mean, torch.ones_like(mean))
        return None

    def update_running_error(self, total: Tensor, count: int) -> None:
        """Take errors of a step, summed over ``count`` selections at each pixel, into the running mean [H, W]."""
        assert self.running_error is not None
        assert self.running_steps is not None
        if count == 0:
            return
        mean = total.to(self.running_error) / count
        # An average of all steps at first, of about the last hundred later on.
        self.running_steps += 1
        keep = torch.clamp(1.0 - 1.0 / self.running_steps.to(mean.dtype), max=_ERROR_MEMORY)
        self.running_error.lerp_(mean, 1.0 - keep)

    def check_input(self, x: Tensor) -> None:
        """Refuse an input of another shape; ConfigError says which the layer takes."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or tuple(x.shape[2:]) != self.grid:
            raise ConfigError(
                f"SpatialMoE2d was given shape {tuple(x.shape)} but takes [batch, {self.in_channels}, {self.grid[0]}, "
                f"{self.grid[1]}]; its gate belongs to that grid, so make the layer anew or regrid the data"
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
