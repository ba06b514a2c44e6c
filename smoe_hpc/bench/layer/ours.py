"""Our layer as a user calls it, part by part: what :mod:`smoe_hpc.bench.layer.study` measures beside its baselines.

The parameter is in float32, as mixed-precision training keeps it: its cast and packing belong to every call. Choosing the
experts and planning happen once an optimiser step whatever the number of passes, and are parts of their own; the other
parts use a choice that is held, as a training loop holds it.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.bench.layer.baselines import Call, Inputs
from smoe_hpc.bench.layer.case import Shape
from smoe_hpc.kernels import Routing, select_experts
from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.planning.cost import suits_tiles
from smoe_hpc.kernels.planning.geometry import geometry_for
from smoe_hpc.kernels.planning.making import make_plan, to_index
from smoe_hpc.kernels.planning.plan import Plan
from smoe_hpc.layers import Damping, LatentGate, RoutingLoss, SpatialMoE2d, hold_routing, routing_loss

ORDER = "id"


def make_inputs(shape: Shape, values: Tensor, dtype: torch.dtype, padding: str) -> Inputs:
    """Random input and output gradient for a layer with these gate values, on their device."""
    device, batch, grid = values.device, shape.batch, shape.grid

    def random(channels: int) -> Tensor:
        made = torch.randn(batch, channels, *grid, device=device, dtype=dtype)
        return made.to(memory_format=torch.channels_last)

    x, grad = random(shape.channels).requires_grad_(), random(shape.out_channels)
    return Inputs(shape, x, grad, values, select_experts(values, shape.selected, ORDER), padding)


def make_layer(inputs: Inputs, *, learns: bool) -> SpatialMoE2d:
    """The layer of these inputs with its choice held; without routing loss and damping unless it ``learns``."""
    shape, device = inputs.shape, inputs.x.device
    with torch.device(device):
        gate = LatentGate(shape.num_experts, shape.selected, shape.grid)
        gate.logits = nn.Parameter(inputs.values)
        layer = SpatialMoE2d(
            shape.channels,
            shape.num_experts,
            shape.selected,
            shape.grid,
            filters_per_expert=shape.filters,
            kernel_size=shape.kernel_size,
            padding=inputs.padding,
            gate=gate,
            expert_order=ORDER,
            routing_loss=RoutingLoss() if learns else None,
            damping=Damping() if learns else None,
        )
    hold_routing(layer)
    return layer


def ours(part: str, inputs: Inputs) -> Call | None:
    """A call that does a part of the work: "forward", "backward" (forward and backward), "step" (with routing loss and
    damping), "select" or "plan".
    """
    shape = inputs.shape
    if part == "select":
        return lambda: select_experts(inputs.values, shape.selected, ORDER)
    if part == "plan":
        plans = runs_tiles(inputs) and library.available(inputs.x.device)
        return (lambda: _plan_anew(inputs)) if plans else None
    if part == "step" and not shape.learns_routing:
        return None
    layer = make_layer(inputs, learns=part == "step")
    kind, dtype = inputs.x.device.type, inputs.x.dtype

    def apply() -> Tensor:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return layer(inputs.x)

    def forward() -> Tensor:
        with torch.no_grad():
            return apply()

    def backward() -> Any:
        y = apply()
        return y, torch.autograd.grad(y, (inputs.x, layer.weight), inputs.grad)

    one = torch.ones((), device=inputs.x.device)

    def step() -> Any:
        y = apply()
        return y, torch.autograd.grad((y, routing_loss(layer)), (inputs.x, *layer.parameters()), (inputs.grad, one))

    return {"forward": forward, "backward": backward, "step": step}[part]


def runs_tiles(inputs: Inputs) -> bool:
    """Whether sizes and type choose the tiled kernels of a GPU, and a plan with them, or the library's dense form."""
    return inputs.x.is_cuda and suits_tiles(*_of_a_plan(inputs)[:3], inputs.routing.choice.shape)


def _of_a_plan(inputs: Inputs) -> tuple[torch.dtype, int, tuple[int, ...], str]:
    shape = inputs.shape
    weight_shape = (shape.num_experts, shape.filters, shape.channels, shape.kernel_size, shape.kernel_size)
    return inputs.x.dtype, shape.batch, weight_shape, inputs.padding


def _plan_anew(inputs: Inputs) -> list[Tensor]:
    """The plan as a layer makes it after its routing changed."""
    routing = inputs.routing
    return Routing(routing.choice, routing.num_experts).plan(*_of_a_plan(inputs))


def plan_of(inputs: Inputs) -> Plan:
    """The plan of the inputs' choice, used or not."""
    shape = inputs.shape
    geometry = geometry_for(
        shape.num_experts, shape.selected, shape.grid, shape.batch, shape.kernel_size, inputs.padding, False
    )
    return make_plan(to_index(inputs.routing.choice), geometry)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Deterministic algorithms on or off; uninitialised memory is left as it is, which costs nothing."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
