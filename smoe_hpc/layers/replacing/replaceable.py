"""Which convolutions an SMoE layer can stand for: those that do what ``torch.nn.Conv2d`` does and nothing else.

A subclass may pad, scale or standardise in its own way; hooks, parametrisations, ties and frozen weights are there for a
reason. None of it shows in a layer's sizes, and all of it would be lost: such layers are left as they are.

Dimensions: K selected experts, F filters per expert.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from smoe_hpc.compat import has_hooks, is_convolution, module_hooks
from smoe_hpc.layers.replacing.report import Grid
from smoe_hpc.layers.spatial_moe import SpatialMoE2d

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def find_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """What a report lists, by name: convolutions of any kind and SMoE layers."""
    return {name: m for name, m in model.named_modules() if is_convolution(m) or isinstance(m, SpatialMoE2d)}


def reason_to_leave(
    model: nn.Module, name: str, module: nn.Module, min_kernel: int, filters: int, exclude: Collection[str]
) -> str | None:
    """Why an SMoE layer cannot stand for this module of the model wherever it works, or None if it can."""
    if any(not skip or name == skip or name.startswith(f"{skip}.") for skip in exclude):
        return "excluded"
    if isinstance(module, SpatialMoE2d):
        return "it is an SMoE layer already"
    if any(isinstance(m, SpatialMoE2d) and module in m.modules() for m in model.modules()):
        return "it is a part of an SMoE layer"
    what = _other_behaviour(module)
    if what is not None:
        return what
    assert isinstance(module, nn.Conv2d)
    return _other_parameters(model, module) or _other_arguments(module, min_kernel, filters)


def reason_of_grids(grids: set[Grid]) -> str | None:
    """Why an SMoE layer cannot work on these grids, or None if it can."""
    if not grids:
        return "no grid is known (it did not run, or grid_of lacks it)"
    return f"it works on several grids {sorted(grids)}" if len(grids) > 1 else None


def _other_behaviour(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is parametrised"  # type: ignore[arg-type]
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        return f"a {kind} has no weights before the model has run once: call the model on a batch, then replace"
    if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
        return f"a {kind} may do more than the torch.nn.Conv2d it is derived from"
    if type(module) is not nn.Conv2d:
        return f"a {kind} is no torch.nn.Conv2d"
    replaced = [name for name, value in vars(module).items() if callable(value) and hasattr(nn.Conv2d, name)]
    if replaced:
        return f"its {', '.join(replaced)} has been replaced"
    for what, hook in module_hooks(module):
        return f"it has a {what}, {getattr(hook, '__name__', None) or type(hook).__name__}"
    more = [*module._buffers, *module._modules, *(set(module._parameters) - {"weight", "bias"})]
    return f"it holds more than a weight and a bias: {', '.join(sorted(more))}" if more else None


def _other_parameters(model: nn.Module, convolution: nn.Conv2d) -> str | None:
    own = {name: p for name, p in convolution._parameters.items() if p is not None}
    if "weight" not in own:
        return "its weight is no parameter of its own"
    for name, parameter in own.items():
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.dtype not in _TYPES:
            return f"its {name} is of {parameter.dtype}"
        if not parameter.requires_grad:
            return f"its {name} is frozen (requires_grad=False)"
        if has_hooks(parameter):
            return f"its {name} has a hook"
        for other_name, other in model.named_modules():
            tensors = (*other.parameters(recurse=False), *other.buffers(recurse=False))
            if other is not convolution and any(_tied(parameter, one) for one in tensors):
                return f"its {name} is tied to a parameter or buffer of {other_name or 'the model itself'}"
    return None


def _tied(one: nn.Parameter, other: Tensor) -> bool:
    if one is other:
        return True
    if type(other) not in (nn.Parameter, Tensor) or one.device != other.device or one.is_meta:
        return False
    (begin, end), (other_begin, other_end) = _bytes(one), _bytes(other)
    return begin < other_end and other_begin < end


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The range of addresses that a tensor spans, gaps included."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _other_arguments(convolution: nn.Conv2d, min_kernel: int, filters: int) -> str | None:
    kernel = convolution.kernel_size
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
    return None
