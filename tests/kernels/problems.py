"""Problems for the expert convolution, drawn at random, and how near their results have to come to those in float64.

What a result may be off by, relative to the norm of the exact one (inputs are rounded first, so that their rounding counts
for nothing):

* float32: 1e-6 for sums of up to 2,048 products; longer ones, added one by one, lose with the root of their number. Where
  the library's dense form is chosen on a GPU, 4e-6: its weight gradient is that much off.
* 16-bit types: what rounding the exact result to that type costs, which no implementation avoids (about 1.6e-3 for bfloat16,
  2e-4 for float16, more or less where a tensor has few elements), and 2e-4 on top for what float32 accumulation and a
  rounding that falls the other way add. Together at most 2e-3, wherever there are enough elements (256) for the rounding to
  be the average one. An input gradient that is folded from a padded one (on a GPU for "sphere", and for "periodic_longitude"
  in the dense form) is rounded before the edges are added, in float32, and after: 1.6 times the rounding, at most 2.6e-3,
  which small grids, mostly edge, come near.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels import cpu, expert_conv2d, select_experts
from smoe_hpc.kernels.padding import pad
from smoe_hpc.kernels.planning.cost import suits_tiles

ON_TOP, AT_MOST, ENOUGH = 2e-4, 2e-3, 256
FOLDED, FOLDED_AT_MOST = 1.6, 2.6e-3
SINGLE, SINGLE_DENSE, LONG = 1e-6, 4e-6, 2048
HALF = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "every other column", "transposed", "slice of channels")


@dataclass(frozen=True)
class Problem:
    """A layer's inputs in float64, rounded to ``dtype``; gradients of x and weight are asked for."""

    x: Tensor
    weight: Tensor
    indices: Tensor
    grad: Tensor
    padding: str
    layout: str

    def to(self, dtype: torch.dtype, device: str) -> Problem:
        """The same numbers, rounded to a type, on a device, x and the output's gradient laid out as the problem says."""
        x, grad = (lay_out(t.to(device, dtype), self.layout) for t in (self.x, self.grad))
        weight = self.weight.to(device, dtype)
        return Problem(x.requires_grad_(), weight.requires_grad_(), self.indices.to(device), grad, self.padding, self.layout)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in memory laid out otherwise."""
    if layout == "channels_last":
        return t.to(memory_format=torch.channels_last).detach()
    if layout == "every other column":
        spread = t.new_full((*t.shape[:3], 2 * t.shape[3]), torch.nan)
        spread[..., ::2] = t
        return spread[..., ::2].detach()
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3).detach()
    if layout == "slice of channels":
        wide = F.pad(t, (0, 0, 0, 0, 1, 2), value=torch.nan)
        return wide[:, 1:-2].detach()
    return t.contiguous().detach()


def draw(seed: int, *, large: bool = False) -> Problem:
    """A problem, small by default; ``large`` ones fill tiles and take in the sizes that the fast kernels are made for."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    padding = dice.choice(["zeros", "periodic_longitude", "sphere"])
    size = dice.choice([1, 3, 3, 3, 5])
    batch = dice.choice([1, 1, 2, 3, 5, 8] if not large else [1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 33])
    channels = dice.choice([1, 2, 3, 5, 8, 12, 16, 24, 33, 40] if not large else [1, 3, 8, 16, 40, 64, 72, 100, 128, 136, 256])
    height, width = (dice.randint(max(2, size // 2), 9 if not large else 24) for _ in range(2))
    width += width % 2 if padding == "sphere" else 0
    filters = dice.choice([1, 1, 1, 2, 3, 4, 8] if not large else [1, 1, 1, 2, 3, 8, 16])
    most = (40 if not large else 300) // filters
    experts = dice.choice([1, 2, dice.randint(1, most), dice.randint(1, most), most])
    selected = dice.choice([1, experts, dice.randint(1, experts), max(1, experts // 2)])
    selected = min(selected, max(1, (40 if not large else 160) // filters))
    if large and dice.random() < 0.5:  # sizes of the fast kernels: C and K F multiples of 8
        channels, selected = -(-channels // 8) * 8, -(-selected // 8) * 8
        experts = max(experts, selected)
    per_sample = dice.random() < 0.25
    values = torch.randn(*([batch] if per_sample else []), experts, height, width, generator=generator)
    if dice.random() < 0.4:  # neighbours choose alike
        values = values.mean((-2, -1), keepdim=True) + 0.02 * values
    indices = select_experts(values, selected, dice.choice(["rank", "id"])).indices
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(experts, filters, channels, size, size, generator=generator, dtype=torch.float64)
    grad = torch.randn(batch, selected * filters, height, width, generator=generator, dtype=torch.float64)
    return Problem(x, weight / (channels * size**2) ** 0.5, indices, grad, padding, dice.choice(LAYOUTS))


def exact(x: Tensor, weight: Tensor, indices: Tensor, padding: str) -> Tensor:
    """All filters everywhere, then those that were selected: in the type that comes in."""
    filters = weight.shape[1]
    every = F.conv2d(pad(x, weight.shape[-1], padding), weight.flatten(0, 1)).unflatten(1, (-1, filters))
    chosen = indices.expand(len(x), -1, -1, -1).unsqueeze(2).expand(-1, -1, filters, -1, -1)
    return every.gather(1, chosen).flatten(1, 2)


def results(problem: Problem, forward=expert_conv2d) -> dict[str, Tensor]:
    """Output and both gradients."""
    if forward is expert_conv2d:
        y = expert_conv2d(problem.x, problem.weight, problem.indices, padding=problem.padding)
    else:
        y = forward(problem.x, problem.weight, problem.indices, problem.padding)
    dx, dw = torch.autograd.grad(y, (problem.x, problem.weight), problem.grad)
    return {"output": y.detach(), "input gradient": dx, "weight gradient": dw}


def expected(problem: Problem) -> dict[str, Tensor]:
    """The same in float64 from the rounded inputs."""
    double = Problem(
        problem.x.detach().double().requires_grad_(),
        problem.weight.detach().double().requires_grad_(),
        problem.indices,
        problem.grad.double(),
        problem.padding,
        problem.layout,
    )
    return results(double, exact)


def products(problem: Problem) -> dict[str, int]:
    """How many products the longest sums of each result add up."""
    taps = problem.weight.shape[-1] ** 2
    pixels = problem.x.shape[0] * problem.x.shape[2] * problem.x.shape[3]
    channels, outputs = problem.x.shape[1], problem.grad.shape[1]
    return {"output": channels * taps, "input gradient": outputs * taps, "weight gradient": pixels}


def check_close(found: dict[str, Tensor], right: dict[str, Tensor], problem: Problem, what: str) -> None:
    on_gpu = found["output"].is_cuda
    dtype, sizes = found["output"].dtype, (len(problem.x), problem.weight.shape, problem.indices.shape)
    dense = on_gpu and not suits_tiles(dtype, *sizes)
    folded = on_gpu and (problem.padding == "sphere" or (dense and problem.padding == "periodic_longitude"))
    for name, ours in found.items():
        theirs = right[name]
        assert ours.shape == theirs.shape, f"{what}: {name}"
        norm = theirs.norm()
        off = (ours.double() - theirs).norm()
        if dtype in HALF:
            share, most = (FOLDED, FOLDED_AT_MOST) if folded and name == "input gradient" else (1.0, AT_MOST)
            rounding = (theirs.to(dtype).double() - theirs).norm()
            limit = share * rounding + ON_TOP * norm
            if ours.numel() >= ENOUGH:
                limit = torch.minimum(limit, most * norm)
        else:
            single = SINGLE_DENSE if dense else SINGLE
            limit = norm * single * max(1.0, products(problem)[name] / LONG) ** 0.5
        assert off <= limit, f"{what}: {name} is off by {off / norm:.2e}, allowed {limit / norm:.2e}"


def poison(device: str) -> None:
    """Fill memory that the allocator will hand out again, in blocks of many sizes: all bits set is a NaN of every type."""
    blocks = [torch.full((1 << bits,), 255, dtype=torch.uint8, device=device) for bits in range(8, 27) for _ in range(4)]
    del blocks


def describe(seed: int, problem: Problem, dtype: torch.dtype) -> str:
    sizes = f"x {tuple(problem.x.shape)}, weight {tuple(problem.weight.shape)}, indices {tuple(problem.indices.shape)}"
    return f"seed {seed}, {dtype}: {sizes}, {problem.padding}, {problem.layout}"


def compiled() -> bool:
    """Whether a CPU runs compiled kernels here, not torch's own: those round 16-bit sums on their way."""
    return cpu.serves(torch.zeros(1, 1, 1, 1))
