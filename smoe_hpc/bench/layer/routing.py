"""Gate values to measure with: smooth in space, without any structure, or as a gate has them after some training.

Dimensions: N experts, K selected, F filters per expert, R regions, B batch, C input channels, H, W grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.bench.layer.case import Case, Shape
from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.padding import pad
from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, end_step, parameter_groups, routing_loss

_SIGMA = 4.0  # pixels over which smooth values are alike
_REGIONS = 4
_LR, _GATE_LR = 1e-2, 0.3  # the gate starts some units wide and has a hundred steps


def gate_values(
    case: Case, device: torch.device, *, seed: int = 0, steps: int = 200, padding: str = "zeros", dtype: torch.dtype
) -> Tensor:
    """Values [N, H, W], float32, of the kind of routing that the case names.

    "smooth": standard normal numbers under a Gaussian of four pixels' standard deviation, longitude wrapped; "random":
    without structure; "learned": of a gate trained by :func:`train_gate`.

    Raises:
        ConfigError: an unknown kind.
    """
    shape = case.shape
    generator = torch.Generator(device).manual_seed(seed)
    if case.routing == "random":
        return torch.rand(shape.num_experts, *shape.grid, device=device, generator=generator)
    if case.routing == "smooth":
        return smooth_fields(shape.num_experts, shape.grid, generator)
    if case.routing == "learned":
        return train_gate(shape, generator, steps=steps, padding=padding, dtype=dtype)
    raise ConfigError(f"routing {case.routing!r} is not known; choose smooth, random or learned")


def smooth_fields(count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, H, W] on the generator's device; as scipy's ``gaussian_filter`` with modes nearest (rows) and wrap (columns)."""
    device = generator.device
    fields = torch.randn(count, *grid, device=device, generator=generator)
    rows, columns = _smoother(grid[0], False, device), _smoother(grid[1], True, device)
    for some in fields.split(512):  # no more than a part of it twice in memory
        some.copy_(rows @ some @ columns.T)
    return fields


def _smoother(size: int, wrap: bool, device: torch.device) -> Tensor:
    """The matrix [size, size] that smooths a vector, cut off at four standard deviations."""
    reach = int(4 * _SIGMA + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=device)
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    neighbours = torch.arange(size, device=device)[:, None] + offsets
    neighbours = neighbours % size if wrap else neighbours.clamp(0, size - 1)
    return torch.zeros(size, size, device=device).scatter_add_(1, neighbours, (weights / weights.sum()).expand(size, -1))


def train_gate(shape: Shape, generator: torch.Generator, *, steps: int, padding: str, dtype: torch.dtype) -> Tensor:
    """Gate values [N, H, W] after some steps of a layer on a task that differs between regions of the grid.

    The task: white noise in, what a convolution of the pixel's region makes of it out; regions as large as smooth fields
    are, filters alike for neighbouring channels, so that an expert one channel away from where a pixel needs it still
    learns. The layer learns by its own routing loss and damping, from its usual start. Some hundred steps find the regions in
    part: how far, the number of experts that a tile needs tells.
    """
    device, grid = generator.device, shape.grid
    if not shape.learns_routing or steps < 1:
        return torch.rand(shape.num_experts, *grid, device=device, generator=generator)
    layer = SpatialMoE2d(
        shape.channels,
        shape.num_experts,
        shape.selected,
        grid,
        filters_per_expert=shape.filters,
        kernel_size=shape.kernel_size,
        padding=padding,
        expert_order="id",
        routing_loss=RoutingLoss(),
        damping=Damping(),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    regions = smooth_fields(_REGIONS, grid, generator).argmax(0)
    size = (shape.selected, shape.filters * shape.channels * shape.kernel_size**2)
    teachers = torch.randn(_REGIONS, *size, device=device, generator=generator)
    teachers = _smoother(shape.selected, True, device) @ teachers
    teachers = teachers / (teachers.std() * (shape.channels * shape.kernel_size**2) ** 0.5)
    filters = teachers.view(-1, shape.channels, shape.kernel_size, shape.kernel_size).to(dtype)
    optimizer = torch.optim.Adam(parameter_groups(layer, lr=_LR, gate_lr=_GATE_LR))
    for step in range(steps):
        x = torch.randn(shape.batch, shape.channels, *grid, device=device, generator=generator, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)
        every = F.conv2d(pad(x, shape.kernel_size, padding), filters).view(shape.batch, _REGIONS, shape.out_channels, *grid)
        target = every.gather(1, regions.expand(shape.batch, 1, shape.out_channels, *grid)).squeeze(1)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = layer(x)
        ((y.float() - target.float()).square().mean() + routing_loss(layer)).backward()
        optimizer.step()
        end_step(layer, step)
    return layer.gate.raw_values(x).detach().clone()
