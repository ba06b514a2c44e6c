"""Turn a network of one's own into an SMoE network: its convolutions become Spatial Mixture-of-Experts layers.

The paper replaces the convolutions of a ResNet so that channel counts stay: a layer selects K experts of F filters with
K F = the convolution's output channels. What is replaced, and why the rest is not, is told.

Dimensions: C input channels, H latitude rows, W longitude columns, N experts, K selected experts, F filters per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.convolution import ChannelBias
from smoe_hpc.layers.gates import Gate
from smoe_hpc.layers.spatial_moe import SpatialMoE2d

Grid = tuple[int, int]


@dataclass(frozen=True)
class Replacement:
    """What became of one convolution.

    Args:
        name: of the module in the model; "" is the model itself.
        grid: (H, W) it works on, where that is known.
        num_experts: N, None where it was left as it is.
        selected: K, None where it was left as it is.
        gate: number of its gate, equal for layers that share one; None where it was left as it is.
        reason: why it was left as it is; None where it was replaced.
    """

    name: str
    grid: Grid | None
    num_experts: int | None = None
    selected: int | None = None
    gate: int | None = None
    reason: str | None = None

    def __str__(self) -> str:
        name = self.name or "(the model itself)"
        if self.reason is not None:
            return f"{name}: left, {self.reason}"
        assert self.grid is not None
        return (
            f"{name}: {self.selected} of {self.num_experts} experts on {self.grid[0]}x{self.grid[1]}, gate {self.gate}"
        )


@dataclass(frozen=True)
class ReplacementReport:
    """What became of every convolution of the model, in the model's order; ``print`` shows a line for each."""

    layers: tuple[Replacement, ...]

    @property
    def replaced(self) -> list[str]:
        """Names of the convolutions that were replaced."""
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def left(self) -> dict[str, str]:
        """Names of those that were left, with the reason."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def find_grids(model: nn.Module, example_input: Any) -> dict[str, set[Grid]]:
    """Grids on which each ``torch.nn.Conv2d`` of the model works, found by one forward pass without gradients.

    Args:
        model: any network; its training mode, buffers included, is left as it was found.
        example_input: a tensor, or a tuple of arguments, as the model takes.

    Returns:
        {module name: {(H, W) of the output, ...}}; a layer that never ran has none.
    """
    grids: dict[str, set[Grid]] = {}
    hooks = []

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: grids[name].add((int(output.shape[-2]), int(output.shape[-1])))

    modes = [(module, module.training) for module in model.modules()]
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            grids[name] = set()
            hooks.append(module.register_forward_hook(note(name)))
    try:
        model.eval()  # so that batch normalisation keeps its statistics
        with torch.no_grad():
            model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return grids


def replace_convolutions(
    model: nn.Module,
    example_input: Any = None,
    *,
    num_experts: int | Callable[[int], int],
    grid_of: Mapping[str, Grid] | None = None,
    min_kernel: int = 3,
    filters_per_expert: int = 1,
    gate_sharing: bool = False,
    exclude: Collection[str] = (),
    gate: str = "latent",
    expert_order: str = "id",
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[nn.Module, ReplacementReport]:
    """Replace each convolution that an SMoE layer can stand for by one with the same channels; in place.

    Replaced are ``torch.nn.Conv2d`` of an odd square kernel of at least ``min_kernel``, stride 1, dilation 1, one
    group, zero padding that keeps the grid, working on one grid. The layer starts from new filters, because K of N
    experts have no counterpart in the convolution's; a bias is kept, with its values, as a bias per channel after the
    layer.

    Args:
        model: the network; changed in place.
        example_input: what the model takes (a tuple: several arguments), to find the grids by a forward pass.
        num_experts: N; or a function of K, for networks of varied width, e.g. ``lambda selected: 2 * selected``.
        grid_of: {module name: (H, W)} instead of an example input; modules it lacks are left.
        min_kernel: smaller kernels are left: a 1x1 convolution sees no neighbours.
        filters_per_expert: F; convolutions whose channels F does not divide are left.
        gate_sharing: one gate for all layers of equal (grid, N, K), as the paper does in deep networks; latent gates
            only.
        exclude: names of modules to leave, with everything under them.
        gate: kind of the gates.
        expert_order: "id" keeps an expert in its place among the channels, which the layers that follow rely on;
            "rank".
        generator: of the start values.
        options: of :class:`SpatialMoE2d`: ``weighted``, ``routing_loss``, ``damping``.

    Returns:
        The model (another object only if it is itself one convolution), and a report of what was replaced and why the
        rest was not.

    Raises:
        ConfigError: neither or both of ``example_input`` and ``grid_of``; N below K; sharing of gates that read the
            input; an excluded or mapped name that the model does not have; or nothing that could be replaced.
    """
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if gate_sharing and gate != "latent":
        raise ConfigError(f"gate_sharing with gate={gate!r}: layers have different inputs; share only latent gates")
    _check_names(model, exclude, "exclude")
    if (example_input is None) == (grid_of is None):
        raise ConfigError(
            "give replace_convolutions either an example_input or grid_of, to know the grid of each layer"
        )
    if grid_of is None:
        grids = find_grids(model, example_input)
    else:
        _check_names(model, grid_of, "grid_of")
        grids = {name: {grid_of[name]} if name in grid_of else set() for name in convolutions}

    plan: list[Replacement] = []  # made whole before the model is touched
    for name, convolution in convolutions.items():
        grid = next(iter(grids[name])) if len(grids[name]) == 1 else None
        reason = _reason_to_leave(name, convolution, grids[name], min_kernel, filters_per_expert, exclude)
        if reason is not None:
            plan.append(Replacement(name, grid, reason=reason))
            continue
        selected = convolution.out_channels // filters_per_expert
        experts = num_experts(selected) if callable(num_experts) else num_experts
        if experts < selected:
            raise ConfigError(
                f"layer {name!r} selects {selected} experts but num_experts={experts}; give at least {selected}, a "
                "function such as num_experts=lambda selected: 2 * selected, or exclude the layer"
            )
        plan.append(Replacement(name, grid, experts, selected))
    if not any(entry.reason is None for entry in plan):
        told = "; ".join(map(str, plan)) or "it has no torch.nn.Conv2d"
        raise ConfigError(f"no convolution of the model can become an SMoE layer: {told}")

    gates: dict[tuple[Grid, int, int], Gate] = {}
    numbers: dict[int, int] = {}
    report: list[Replacement] = []
    for entry in plan:
        if entry.reason is not None:
            report.append(entry)
            continue
        assert entry.grid is not None
        assert entry.num_experts is not None
        assert entry.selected is not None
        convolution = convolutions[entry.name]
        key = (entry.grid, entry.num_experts, entry.selected)
        layer = SpatialMoE2d(
            convolution.in_channels,
            entry.num_experts,
            entry.selected,
            entry.grid,
            filters_per_expert=filters_per_expert,
            kernel_size=int(convolution.kernel_size[0]),
            gate=gates.get(key, gate) if gate_sharing else gate,
            expert_order=expert_order,
            generator=generator,
            **options,
        )
        gates.setdefault(key, layer.gate)
        number = numbers.setdefault(id(layer.gate), len(numbers))
        model = _put(model, convolution, _with_bias(layer, convolution))
        report.append(replace(entry, gate=number))
    return model, ReplacementReport(tuple(report))


def _check_names(model: nn.Module, names: Collection[str], argument: str) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in known:
            raise ConfigError(f"{argument} names {name!r}, which the model does not have; see model.named_modules()")


def _reason_to_leave(
    name: str, convolution: nn.Conv2d, grids: set[Grid], min_kernel: int, filters: int, exclude: Collection[str]
) -> str | None:
    """Why an SMoE layer cannot stand for this convolution, or None if it can."""
    kernel = convolution.kernel_size
    if any(not skip or name == skip or name.startswith(f"{skip}.") for skip in exclude):
        return "excluded"
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        return f"kernel {kernel[0]}x{kernel[1]} is not odd and square"
    if kernel[0] < min_kernel:
        return f"kernel {kernel[0]}x{kernel[0]} is smaller than {min_kernel}"
    if convolution.stride != (1, 1):
        return f"stride {convolution.stride} changes the grid"
    if convolution.dilation != (1, 1):
        return f"dilation {convolution.dilation}"
    if convolution.groups != 1:
        return f"{convolution.groups} groups"
    if convolution.padding_mode != "zeros":
        return f"padding mode {convolution.padding_mode!r}"
    if convolution.padding not in ("same", (kernel[0] // 2, kernel[0] // 2)):
        return f"padding {convolution.padding} changes the grid"
    if convolution.out_channels % filters:
        return f"{convolution.out_channels} channels are not a multiple of filters_per_expert={filters}"
    if not grids:
        return "no grid is known (it did not run, or grid_of lacks it)"
    if len(grids) > 1:
        return f"it works on several grids {sorted(grids)}"
    return None


def _with_bias(layer: SpatialMoE2d, convolution: nn.Conv2d) -> nn.Module:
    """The layer, followed by the convolution's bias if it has one, on its device and in its precision."""
    new: nn.Module = layer
    if convolution.bias is not None:
        bias = ChannelBias(convolution.out_channels)
        with torch.no_grad():
            bias.bias.copy_(convolution.bias)
        new = nn.Sequential(layer, bias)
    return new.to(convolution.weight.device, convolution.weight.dtype).train(convolution.training)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever the model holds ``old``: a module may be registered at several places."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would tell a child once only
            if child is old:
                setattr(parent, name, new)
    return model
