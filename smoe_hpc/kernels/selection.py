"""Selecting the experts of highest value at every pixel.

Dimensions: S choices, B batch, N experts, K selected, H latitude rows, W longitude columns, P = H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.cuda.selection import can_select, select_cuda
from smoe_hpc.kernels.ranges import mark_right
from smoe_hpc.kernels.routing import Routing

EXPERT_ORDERS = ("rank", "id")
_FEW_EXPERTS = 16
_library = torch.library.Library("smoe_hpc", "FRAGMENT")
_library.define("select(Tensor values, int selected, str expert_order) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def select_experts(values: Tensor, selected: int, expert_order: str = "rank") -> Routing:
    """The ``selected`` experts of highest value at every pixel; a tie goes to the expert of the lower number.

    A NaN counts as the highest value, in every type and on every device.

    Args:
        values: [N, H, W] or [B, N, H, W] gate values; float32 on every device gives the same choice.
        selected: K, at most N.
        expert_order: "rank" makes the k-th best expert the k-th (the published order), "id" orders by number, which
            keeps channels where they are when two selected values cross.

    Raises:
        ConfigError: more selected than there are, more than a million experts, or an unknown order.
    """
    num_experts = values.shape[-3]
    if not 1 <= selected <= num_experts:
        raise ConfigError(f"selected={selected} of num_experts={num_experts}: give a number from 1 to num_experts")
    if expert_order not in EXPERT_ORDERS:
        raise ConfigError(f"expert_order={expert_order!r} is not known; choose one of {', '.join(EXPERT_ORDERS)}")
    if num_experts > 1 << 20:
        raise ConfigError(f"num_experts={num_experts}: at most {1 << 20} experts can be distinguished in a selection")
    with torch.no_grad():
        if _selects_compiled(values, selected, expert_order):
            index = _selected_index(values, selected, expert_order)
            choice = index.unflatten(1, values.shape[-2:]).permute(0, 3, 1, 2)
            return _made(choice if values.dim() == 4 else choice[0], num_experts)
        if selected == 1:
            return _made(_best(values), num_experts)
        if values.dtype == torch.float64:
            indices = values.sort(dim=-3, descending=True, stable=True).indices[..., :selected, :, :]
        else:
            indices = _unique_keys(values.float()).topk(selected, dim=-3, sorted=expert_order == "rank").indices
        if expert_order == "id":
            indices = indices.sort(-3).values
        return _made(indices.contiguous(), num_experts)


def _unique_keys(values: Tensor) -> Tensor:
    """Integers that sort as float32 ``values`` [..., N, H, W] do, a tie going to the expert of the lower number.

    A NaN is above everything whatever its sign, which the hardware chooses: x86 gives 0 / 0 a negative one.
    """
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 and 0.0 tie
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits).masked_fill(values.isnan(), 0x7FFFFFFF)
    number = torch.arange(values.shape[-3] - 1, -1, -1, device=values.device)
    return (ordered << 20) + number[:, None, None]


def _best(values: Tensor) -> Tensor:
    """The number of the highest value, [..., 1, H, W]; of equals the first."""
    if values.device.type != "cpu" or values.shape[-3] > _FEW_EXPERTS:
        return values.argmax(-3, keepdim=True)
    # A CPU's argmax over a dimension that is not the last takes a hundred times as long as these comparisons.
    best = values[..., :1, :, :]
    number = torch.zeros_like(best, dtype=torch.int64)
    for expert in range(1, values.shape[-3]):
        one = values[..., expert : expert + 1, :, :]
        number = torch.where((one > best) | (one.isnan() & ~best.isnan()), expert, number)
        best = torch.maximum(best, one)
    return number


def _selects_compiled(values: Tensor, selected: int, expert_order: str) -> bool:
    """Whether a GPU's kernel makes this choice."""
    if not values.is_cuda or values.dtype == torch.float64 or not library.available(values.device):
        return False
    return bool(values.numel()) and can_select(values.shape[-3], selected, expert_order)


def _made(choice: Tensor, num_experts: int) -> Routing:
    mark_right(choice, num_experts)
    return Routing(choice, num_experts)


# -- one operation for a compiler ------------------------------------------------------------------------------------------


def _selected_index(values: Tensor, selected: int, expert_order: str) -> Tensor:
    """The choice on a GPU as index [S, P, K] int32, from values [N, H, W] or [S, N, H, W]."""
    if torch.compiler.is_compiling():
        return torch.ops.smoe_hpc.select.default(values, selected, expert_order)
    return _select(values, selected, expert_order)


def _select(values: Tensor, selected: int, expert_order: str) -> Tensor:
    return select_cuda(values, selected, expert_order)


def _fake_select(values: Tensor, selected: int, expert_order: str) -> Tensor:
    choices = values.shape[0] if values.dim() == 4 else 1
    return values.new_empty((choices, values.shape[-2] * values.shape[-1], selected), dtype=torch.int32)


_library.impl("select", _select, "CUDA")
torch.library.register_fake("smoe_hpc::select", _fake_select, lib=_library)
