"""The portable kernels against a float64 reference, over random shapes, routings and tiles."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from smoe_hpc.kernels.cuda import hopper, portable
from smoe_hpc.kernels.cuda.library import Unsupported
from smoe_hpc.kernels.planning.geometry import Geometry
from smoe_hpc.kernels.planning.making import make_plan
from smoe_hpc.kernels.planning.tiles import Tile

pytestmark = pytest.mark.gpu

TILES = {32: (2, 2), 16: (2, 4), 8: (4, 4), 4: (4, 8), 2: (8, 8), 1: (8, 16)}
# Norm-wise relative error of y, dx and dw: 16-bit outputs are rounded once (of few numbers up to 2e-3), dw is float32.
TOLERANCES = {
    torch.float32: (1e-6, 1e-6, 1e-6),
    torch.bfloat16: (2.1e-3, 2.1e-3, 3e-6),
    torch.float16: (6e-4, 6e-4, 3e-6),
}


class Case:
    """A layer's tensors as the kernels take them, and its plan."""

    def __init__(self, seed, dtype, *, batch, channels, grid, experts, selected, filters, kernel_size=3, padding="zeros",
                 per_sample=False, tile=8, input_tile=8):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        reach, valid = kernel_size // 2, padding == "valid"
        rows, columns = TILES[tile]
        self.geometry = Geometry(
            num_experts=experts,
            selected=selected,
            choices=batch if per_sample else 1,
            grid=grid,
            input_grid=(grid[0] + 2 * reach, grid[1] + 2 * reach) if valid else grid,
            kernel_size=kernel_size,
            offset=0 if valid else reach,
            wrap=padding == "wrap",
            tile=Tile(rows, columns, tile),
            input_tile=Tile(*TILES[input_tile], input_tile),
            region=(2 * rows, columns),
        )
        keys = torch.rand(self.geometry.choices, grid[0] * grid[1], experts, generator=generator)
        self.index = keys.topk(selected, -1).indices.to(torch.int32).cuda()
        self.plan = make_plan(self.index, self.geometry)
        scale = 1 / math.sqrt(channels * kernel_size**2)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to("cuda", dtype)

        self.x = draw(batch, *self.geometry.input_grid, channels)
        self.weights = draw(experts * filters, kernel_size**2, channels) * scale
        self.g = draw(batch, *grid, selected * filters)
        self.filters = filters

    def kernels(self, *, ordered=True):
        """y, dx and dw; memory that the outputs may get is poisoned first."""
        for like in (self.g, self.x, self.weights.float()):
            torch.full_like(like, math.nan)
        y = portable.forward(self.x, self.weights, self.plan)
        dx = portable.input_grad(self.g, self.weights, self.plan)
        dw = portable.weight_grad(self.x, self.g, self.weights.shape, self.plan, ordered=ordered)
        return y, dx, dw

    def reference(self):
        """The same in float64: all experts' filters by a product of unfolded patches, then a gather."""
        geometry, size = self.geometry, self.geometry.kernel_size
        x = self.x.double().permute(0, 3, 1, 2).contiguous().requires_grad_()
        rows, _, channels = self.weights.shape
        weights = self.weights.double().view(rows, size * size, channels).transpose(1, 2).contiguous().requires_grad_()
        reach = geometry.offset
        if geometry.wrap:
            width = geometry.input_grid[1]
            padded = F.pad(x[..., torch.arange(-reach, width + reach, device="cuda") % width], (0, 0, reach, reach))
        else:
            padded = F.pad(x, (reach, reach, reach, reach))
        every = torch.einsum("nq,bqp->bnp", weights.flatten(1), F.unfold(padded, size))
        batch, pixels = every.shape[0], every.shape[2]
        chosen = self.index.long().expand(batch, -1, -1).transpose(1, 2)[:, :, None].expand(-1, -1, self.filters, -1)
        y = every.view(batch, geometry.num_experts, self.filters, pixels).gather(1, chosen).flatten(1, 2)
        y.backward(self.g.double().flatten(1, 2).transpose(1, 2))
        return y.detach().transpose(1, 2).view_as(self.g), x.grad.permute(0, 2, 3, 1), weights.grad.transpose(1, 2)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def random_sizes(seed):
    draw = random.Random(seed)
    selected = draw.choice([1, 2, 3, 8, 16, 40])
    filters = draw.choice([1, 1, 2, 3, 8, 20]) if selected <= 8 else 1
    per_sample = draw.random() < 0.25
    return {
        "batch": draw.choice([1, 2, 3]) if per_sample else draw.choice([1, 2, 3, 5, 8, 9, 33]),
        "channels": draw.choice([1, 2, 3, 8, 20, 24, 33, 64, 72, 130]),
        "grid": (draw.randint(1, 18), draw.randint(1, 20)),
        "experts": max(selected, draw.choice([selected, selected + 1, 2 * selected, 100])),
        "selected": selected,
        "filters": filters,
        "kernel_size": draw.choice([1, 3, 3, 5, 7]),
        "padding": draw.choice(["zeros", "wrap", "valid"]),
        "per_sample": per_sample,
        "tile": 1 if per_sample else draw.choice([1, 2, 4, 8, 16, 32]),
        "input_tile": 1 if per_sample else draw.choice([1, 2, 4, 8, 16, 32]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_agree_with_float64(seed, dtype):
    case = Case(seed, dtype, **random_sizes(seed))
    expected = case.reference()
    for found, exact, tolerance in zip(case.kernels(), expected, TOLERANCES[dtype], strict=True):
        assert error(found, exact) <= tolerance
    assert error(case.kernels(ordered=False)[2], expected[2]) <= TOLERANCES[dtype][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bit_identical_in_order(dtype):
    sizes = {"batch": 16, "channels": 64, "grid": (24, 32), "experts": 100, "selected": 32, "filters": 1}
    case = Case(1, dtype, padding="wrap", input_tile=4, **sizes)
    first = case.kernels()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, case.kernels(), strict=True))


def test_forward_does_not_depend_on_the_tile():
    sizes = {"batch": 9, "channels": 72, "grid": (9, 11), "experts": 30, "selected": 8, "filters": 2}
    outputs = [
        portable.forward(case.x, case.weights, case.plan)
        for case in (Case(3, torch.bfloat16, tile=tile, input_tile=tile, **sizes) for tile in TILES)
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_agrees_with_hopper_to_the_bit(dtype):
    case = Case(4, dtype, batch=8, channels=136, grid=(12, 20), experts=60, selected=24, filters=1)
    try:
        other = hopper.forward(case.x, case.weights, case.plan)
    except Unsupported:
        pytest.skip("needs a Hopper GPU")
    assert torch.equal(portable.forward(case.x, case.weights, case.plan), other)


def test_kernels_are_captured_by_a_graph():
    case = Case(5, torch.bfloat16, batch=8, channels=64, grid=(12, 12), experts=40, selected=16, filters=1)
    plain = case.kernels()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.kernels()
    for tensor in captured:
        tensor.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))


def test_float64_is_left_to_others():
    case = Case(6, torch.float32, batch=2, channels=8, grid=(4, 4), experts=4, selected=2, filters=1)
    with pytest.raises(Unsupported, match="float64"):
        portable.forward(case.x.double(), case.weights.double(), case.plan)
