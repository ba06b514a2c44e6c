"""Turn a network of one's own into an SMoE network: its convolutions become Spatial Mixture-of-Experts layers.

The paper replaces the convolutions of a ResNet so that channel counts stay: a layer selects K experts of F filters with
K F = the convolution's output channels. A report lists what was replaced, and why the rest was not. It is all or nothing:
everything is decided and made before the model is touched, and is undone if something fails later.

Dimensions: C input channels, H latitude rows, W longitude columns, N experts, K selected experts, F filters per expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.convolutions.convolution import ChannelBias
from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.replacing.calls import find_grids, watch
from smoe_hpc.layers.replacing.replaceable import find_convolutions, reason_of_grids, reason_to_leave
from smoe_hpc.layers.replacing.report import Grid, Replacement, ReplacementReport
from smoe_hpc.layers.spatial_moe import SpatialMoE2d

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")  # which have registered the parameters


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
    group, zero padding that keeps the grid, working on one grid. What may be more than that is left and reported: subclasses,
    parametrisations (weight or spectral normalisation), hooks, tied or frozen parameters, convolutions of other kinds. So
    are those that the model does not call through its modules but through, say, a list: one more forward pass shows it.

    The layer starts from new filters, because K of N experts have no counterpart in the convolution's, but of the same mean
    square, so that what comes out is as large as before; a bias is kept, with its values, as a bias per channel after the
    layer. Make the optimiser afterwards.

    Args:
        model: the network; changed in place.
        example_input: what the model takes (a tuple: several arguments), to find the grids by a forward pass, and to see
            the new layers run.
        num_experts: N; or a function of K, for networks of varied width, e.g. ``lambda selected: 2 * selected``. A warning
            where N = K: nothing is then selected.
        grid_of: {module name: (H, W)} instead of an example input; modules it lacks are left. Nothing is run: check
            yourself that the layers are used.
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
            input; an excluded or mapped name that the model does not have; a model in DistributedDataParallel or
            FullyShardedDataParallel; nothing that could be replaced; or a model that does not run with the new layers. The
            model is then as it was.
    """
    if gate_sharing and gate != "latent":
        raise ConfigError(f"gate_sharing with gate={gate!r}: layers have different inputs; share only latent gates")
    wrapped = next((type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS), None)
    if wrapped is not None:
        raise ConfigError(f"the model is in {wrapped}, which knows its parameters; replace convolutions first, then wrap")
    _check_names(model, exclude, "exclude")
    if (example_input is None) == (grid_of is None):
        raise ConfigError("give replace_convolutions either an example_input or grid_of, to know the grid of each layer")
    found = find_convolutions(model)
    if grid_of is None:
        grids = find_grids(model, example_input)
    else:
        _check_names(model, grid_of, "grid_of")
        grids = {name: {grid_of[name]} for name in found if name in grid_of}

    plan: dict[str, Replacement] = {}
    for name, module in found.items():
        works_on = grids.get(name, set())
        grid = next(iter(works_on)) if len(works_on) == 1 else None
        reason = reason_to_leave(model, name, module, min_kernel, filters_per_expert, exclude) or reason_of_grids(works_on)
        plan[name] = Replacement(name, grid, reason=reason)
        if reason is None:
            assert isinstance(module, nn.Conv2d)
            plan[name] = _sized(plan[name], module.out_channels // filters_per_expert, num_experts)
    _refuse_nothing(plan)

    options = {"filters_per_expert": filters_per_expert, "expert_order": expert_order, **options}
    made = _make(plan, found, gate, gate_sharing, generator, options)
    parents = {name: _parents(model, found[name]) for name in made}
    for name, new in made.items():
        model = _put(model, found[name], new, parents[name])
    if example_input is not None:
        try:
            unused = _unused(model, found, made, example_input)
        except BaseException:
            for name in made:
                model = _put(model, made[name], found[name], parents[name])
            raise
        for name in unused:
            model = _put(model, made.pop(name), found[name], parents[name])
            plan[name] = replace(plan[name], num_experts=None, selected=None, reason=_ANOTHER_WAY)
        _refuse_nothing(plan)
    return model, _report(model, plan, made)


_ANOTHER_WAY = (
    "the model calls it by another way than its modules (a plain list, a closure), where no other layer can be put; hold it as "
    "a module only, e.g. in an nn.ModuleList"
)


def _check_names(model: nn.Module, names: Collection[str], argument: str) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in known:
            raise ConfigError(f"{argument} names {name!r}, which the model does not have; see model.named_modules()")


def _sized(entry: Replacement, selected: int, num_experts: int | Callable[[int], int]) -> Replacement:
    """The entry with K and N."""
    experts = num_experts(selected) if callable(num_experts) else num_experts
    if experts < selected:
        raise ConfigError(
            f"layer {entry.name!r} selects {selected} experts but num_experts={experts}; give at least {selected}, a "
            "function such as num_experts=lambda selected: 2 * selected, or exclude the layer"
        )
    if experts == selected:
        warnings.warn(
            f"layer {entry.name!r} selects {selected} of {experts} experts: all of them everywhere, which is a convolution; "
            "give more experts, or exclude the layer",
            stacklevel=3,
        )
    return replace(entry, num_experts=experts, selected=selected)


def _refuse_nothing(plan: Mapping[str, Replacement]) -> None:
    if all(entry.reason is not None for entry in plan.values()):
        told = "; ".join(map(str, plan.values())) or "it has no torch.nn.Conv2d"
        raise ConfigError(f"no convolution of the model can become an SMoE layer: {told}")


def _make(
    plan: Mapping[str, Replacement],
    found: Mapping[str, nn.Module],
    gate: str,
    gate_sharing: bool,
    generator: torch.Generator | None,
    options: Mapping[str, Any],
) -> dict[str, nn.Module]:
    """What stands for each convolution that is to be replaced."""
    made: dict[str, nn.Module] = {}
    gates: dict[tuple[Grid, int, int], Gate] = {}
    for name, entry in plan.items():
        if entry.reason is not None:
            continue
        convolution = found[name]
        assert isinstance(convolution, nn.Conv2d)
        assert entry.grid is not None
        assert entry.num_experts is not None
        assert entry.selected is not None
        key = (entry.grid, entry.num_experts, entry.selected)
        layer = SpatialMoE2d(
            convolution.in_channels,
            entry.num_experts,
            entry.selected,
            entry.grid,
            kernel_size=int(convolution.kernel_size[0]),
            gate=gates.get(key, gate) if gate_sharing else gate,
            generator=generator,
            **options,
        )
        gates.setdefault(key, layer.gate)
        made[name] = _in_place_of(convolution, layer)
    return made


def _in_place_of(convolution: nn.Conv2d, layer: SpatialMoE2d) -> nn.Module:
    """The layer, as large as the convolution, followed by its bias if it has one, on its device and in its precision."""
    old = convolution.weight.detach()
    with torch.no_grad():
        if not (old.is_meta or layer.weight.is_meta):
            size = old.double().square().mean().sqrt().item()
            layer.weight.mul_(size / layer.weight.double().square().mean().sqrt().item())
        new: nn.Module = layer
        if convolution.bias is not None:
            bias = ChannelBias(convolution.out_channels)
            bias.bias = nn.Parameter(convolution.bias.detach().clone())
            new = nn.Sequential(layer, bias)
    return new.to(old.device, old.dtype).train(convolution.training)


def _parents(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of each registration of a module in the model: there may be several."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def _put(model: nn.Module, old: nn.Module, new: nn.Module, parents: list[tuple[nn.Module, str]]) -> nn.Module:
    """Register ``new`` instead of ``old``; returns the model."""
    for parent, name in parents:
        parent._modules[name] = new
    return new if model is old else model


def _unused(model: nn.Module, found: Mapping[str, nn.Module], made: Mapping[str, nn.Module], example_input: Any) -> list[str]:
    """Names of the layers that the model does not use, or not alone: their convolutions still run."""
    try:
        calls = watch(model, [*made.values(), *(found[name] for name in made)], example_input)
    except Exception as error:
        what = str(error).partition("\n")[0]
        raise ConfigError(
            f"with its convolutions replaced the model does not run on the example input ({type(error).__name__}: {what}); "
            "exclude those that it uses otherwise than by calling them"
        ) from error
    return [name for name, new in made.items() if calls[id(found[name])] or not calls[id(new)]]


def _report(model: nn.Module, plan: Mapping[str, Replacement], made: Mapping[str, nn.Module]) -> ReplacementReport:
    numbers: dict[int, int] = {}
    report: list[Replacement] = []
    for name, entry in plan.items():
        if name in made:
            gate = next(m for m in made[name].modules() if isinstance(m, SpatialMoE2d)).gate
            entry = replace(entry, gate=numbers.setdefault(id(gate), len(numbers)))
        report.append(entry)
    return ReplacementReport(tuple(report))
