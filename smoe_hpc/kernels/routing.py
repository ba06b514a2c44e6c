"""Which experts each pixel uses: the choice itself and how it is made.

Dimensions: B batch, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import planning
from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.cuda.selection import can_select
from smoe_hpc.kernels.plan import to_index
from smoe_hpc.kernels.ranges import mark_right
from smoe_hpc.kernels.windows import tile_for

EXPERT_ORDERS = ("rank", "id")
_FEW_EXPERTS = 16
_read_by_graphs: dict[int, Routing] = {}  # a graph has bare addresses: nobody knows how long it is replayed


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts every pixel uses.

    Args:
        choice: [K, H, W], or [B, K, H, W] where each sample has its own; int64 or int32 numbers of experts, all different at
            a pixel. Output channel k of a pixel is its k-th entry. A GPU's are int32 and lie pixel by pixel, as its kernels
            take them.
        num_experts: N.
    """

    choice: Tensor
    num_experts: int
    _plans: dict[tuple[object, ...], list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def indices(self) -> Tensor:
        """The choice as torch's indexing takes it, int64: a copy where it is int32."""
        return self.choice.to(torch.int64)

    def __getstate__(self) -> dict[str, object]:
        """Without plans: a copy (or a pickle) makes its own."""
        return {**self.__dict__, "_plans": {}}

    @property
    def selected(self) -> int:
        """K, the number of experts a pixel uses."""
        return self.choice.shape[-3]

    @property
    def per_sample(self) -> bool:
        """Whether each sample of the batch has its own choice."""
        return self.choice.dim() == 4

    def plan(self, dtype: torch.dtype, batch: int, weight_shape: Sequence[int], padding: str) -> list[Tensor]:
        """Tensors of this choice's plan for a layer, for :func:`smoe_hpc.kernels.expert_conv2d`; kept for the next time.

        Layers of one gate and equal kernel size share it. Empty where no kernel uses one: on a CPU, or for a layer so small
        that the dense form is faster. A CUDA graph that is captured reads the plan if there is one, and this routing is then
        kept for good; else making it becomes a part of the graph.

        Args:
            dtype: in which the layer computes.
            batch: B.
            weight_shape: N, F, C, k, k.
            padding: of the layer.
        """
        choice = self.choice
        if not (choice.is_cuda and planning.suits_tiles(dtype, batch, weight_shape, choice.shape)):
            return []
        if not library.available(choice.device):
            return []
        if torch.compiler.is_compiling():  # a compiled graph's memory is its own: nothing of it is kept
            return self._made_plan(batch, weight_shape[-1], padding)
        key: tuple[object, ...] = (tile_for(batch, self.per_sample), weight_shape[-1], padding)
        capture = library.capture_of(choice.device)
        if capture and key in self._plans:
            _read_by_graphs[id(self)] = self
        elif capture:  # what a CUDA graph will only write when it is replayed serves nobody but those captured with it
            key = (*key, capture)
        if key not in self._plans:
            with torch.inference_mode(False):
                self._plans[key] = self._made_plan(batch, weight_shape[-1], padding)
        return self._plans[key]

    def _made_plan(self, batch: int, kernel_size: int, padding: str) -> list[Tensor]:
        grid = (int(self.choice.shape[-2]), int(self.choice.shape[-1]))
        with torch.no_grad():
            return planning.plan_tensors(to_index(self.choice), self.num_experts, grid, batch, kernel_size, padding)

    def load(self) -> Tensor:
        """Share of all selections that each expert gets: [N], float32, sums to 1."""
        chosen = self.choice.flatten()
        ones = torch.ones_like(chosen, dtype=torch.int64)
        counts = ones.new_zeros(self.num_experts).index_add_(0, chosen, ones)
        return counts.to(torch.float32) / max(chosen.numel(), 1)

    def changed_from(self, other: Routing) -> Tensor:
        """Share of this routing's selections (pixel, expert) that ``other`` does not have; 0-d float32."""
        if self.selected == 1:
            return (self.choice != other.choice).to(torch.float32).mean()
        new, old = (routing.choice.to(torch.int32).sort(-3).values for routing in (self, other))
        dim = new.dim() - 3
        here = torch.searchsorted(old.movedim(dim, -1).contiguous(), new.movedim(dim, -1).contiguous())
        found = old.movedim(dim, -1).gather(-1, here.clamp(max=self.selected - 1)) == new.movedim(dim, -1)
        return 1.0 - found.to(torch.float32).mean()


def _unique_keys(values: Tensor) -> Tensor:
    """Integers that sort as float32 ``values`` [..., N, H, W] do, a tie going to the expert of the lower number."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 and 0.0 tie
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
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


def select_experts(values: Tensor, selected: int, expert_order: str = "rank") -> Routing:
    """The ``selected`` experts of highest value at every pixel; a tie goes to the expert of the lower number.

    Args:
        values: [N, H, W] or [B, N, H, W] gate values; float32 on every device gives the same choice.
        selected: K, at most N.
        expert_order: "rank" puts the k-th best expert in place k (the published order), "id" orders by number, which
            keeps channels in place when two selected values cross.

    Raises:
        ConfigError: more selected than there are, more than a million experts, or an unknown order.
    """
    num_experts = values.shape[-3]
    if not 1 <= selected <= num_experts:
        raise ConfigError(f"selected={selected} of num_experts={num_experts}: give a number from 1 to num_experts")
    if expert_order not in EXPERT_ORDERS:
        raise ConfigError(f"expert_order={expert_order!r} is not known; choose one of {', '.join(EXPERT_ORDERS)}")
    if num_experts > 1 << 20:
        raise ConfigError(f"num_experts={num_experts}: at most {1 << 20} experts can be told apart in a selection")
    with torch.no_grad():
        if _selects_compiled(values, selected, expert_order):
            index = planning.select(values, selected, expert_order)
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
