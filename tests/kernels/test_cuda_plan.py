"""Selecting, planning and packing on a GPU: bit for bit what the fallback in torch gives."""

import gc
import random
import weakref

import pytest
import torch

from smoe_hpc.kernels import select_experts
from smoe_hpc.kernels.planning.geometry import geometry_for, plan_geometry
from smoe_hpc.kernels.planning.making import make_plan, to_index
from smoe_hpc.kernels.planning.reference import plan_reference
from smoe_hpc.kernels.planning.statistics import plan_statistics
from smoe_hpc.kernels.planning.tiles import Tile

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
KINDS = ("normal", "ties", "constant", "rising", "steps", "special")


def make_values(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    number = torch.arange(shape[-3])[:, None, None].expand(shape).contiguous()
    if kind == "ties":
        return values.mul(2).round()
    if kind == "special":
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42])
        which = torch.randint(20, shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(which < 7, special[which.clamp(max=6)], values)
    return {"constant": torch.full(shape, 0.25), "rising": number.float(), "steps": (number // 7).float()}.get(kind, values)


def check_selection(shape: tuple[int, ...], selected: int, kind: str, order: str, seed: int = 0) -> None:
    from smoe_hpc.kernels.cuda.selection import select_cuda

    values = make_values(shape, kind, seed)
    expected = select_experts(values, selected, order).indices
    assert torch.equal(select_cuda(values.to(DEVICE), selected, order).cpu(), to_index(expected))


@pytest.mark.parametrize("order", ["rank", "id"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "selected"),
    [((3, 5, 7), 2), ((64, 4, 9), 8), ((130, 3, 8), 128), ((256, 8, 8), 128), ((500, 3, 3), 500), ((2, 300, 5, 4), 17),
     ((1025, 5, 5), 40), ((3000, 2, 8), 300), ((2000, 2, 4), 1500), ((5000, 3, 4), 1000), ((65535, 1, 8), 128),
     ((2500, 3, 3), 1100), ((9000, 2, 2), 9000)],
)  # fmt: skip
def test_selection_is_that_of_torch(shape, selected, kind, order):
    check_selection(shape, selected, kind, order)


@pytest.mark.parametrize("order", ["rank", "id"])
@pytest.mark.parametrize(("experts", "selected"), [(1536, 600), (1100, 300), (3000, 900)])
@pytest.mark.parametrize("every", [2, 3, 4, 6])
def test_a_few_experts_far_above_the_others(experts, selected, order, every):
    # Kernels for many experts guess a bound from some of them, which may be those.
    values = make_values((experts, 3, 5), "normal", experts)
    values[::every] += 20
    expected = select_experts(values, selected, order).indices
    assert torch.equal(select_experts(values.to(DEVICE), selected, order).indices.cpu(), expected)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "rising"])
@pytest.mark.parametrize("shape", [(3, 64, 64), (70, 5, 5), (2, 4, 6, 3), (3000, 2, 5)])
def test_the_single_best(shape, kind):
    check_selection(shape, 1, kind, "rank")


def test_random_selections():
    draw = random.Random(1)
    for seed in range(60):
        experts = draw.choice([2, 5, 33, 128, 257, 511, 1024, 1500, 2500])
        selected = draw.randint(1, min(experts, draw.choice([4, 130, 1024])))
        shape = (experts, draw.randint(1, 9), draw.randint(1, 17))
        check_selection((2, *shape) if draw.random() < 0.2 else shape, selected, draw.choice(KINDS[:-1]), "id", seed)


def compare_plans(index: torch.Tensor, geometry) -> None:
    plan = make_plan(index, geometry)
    for made, expected in zip(plan.tensors(), plan_reference(index, geometry), strict=True):
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)


def random_index(choices: int, pixels: int, experts: int, selected: int, alike: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(choices, pixels, experts, generator=generator) * (1 - alike)
    keys = keys + torch.rand(choices, 1, experts, generator=generator) * alike
    return keys.argsort(-1)[..., :selected].to(torch.int32).contiguous().to(DEVICE)


def test_random_plans():
    draw = random.Random(2)
    for seed in range(80):
        experts = draw.choice([1, 3, 16, 33, 100, 257, 700])
        selected = draw.randint(1, min(experts, 130))
        grid = (draw.randint(2, 20), 2 * draw.randint(2, 11))
        padding = draw.choice(["zeros", "periodic_longitude", "sphere"])
        make = draw.choice([plan_geometry, geometry_for])  # the windows by default, or those of the layer
        geometry = make(
            experts,
            selected,
            grid,
            draw.choice([1, 2, 3, 8, 16, 32]),
            draw.choice([1, 3, 3, 5]),
            padding,
            per_sample=draw.random() < 0.2,
        )
        index = random_index(geometry.choices, grid[0] * grid[1], experts, selected, draw.choice([0.0, 0.8]), seed)
        if draw.random() < 0.2:
            index.view(-1)[::7] = draw.choice([-1, experts, 1 << 30, -(1 << 31)])
        compare_plans(index, geometry)


@pytest.mark.parametrize(
    ("experts", "selected", "grid", "batch"),
    [(4096, 128, (8, 8), 8), (65535, 64, (6, 6), 8), (2000, 2000, (4, 4), 8), (1000, 600, (8, 8), 32), (9000, 90, (8, 8), 32),
     (12, 5, (64, 256), 8)],
)  # fmt: skip
def test_large_plans(experts, selected, grid, batch):
    index = random_index(1, grid[0] * grid[1], experts, selected, 0.5, 0)
    compare_plans(index, plan_geometry(experts, selected, grid, batch, 3, "periodic_longitude"))
    compare_plans(index, geometry_for(experts, selected, grid, batch, 3, "periodic_longitude", False))


def test_a_batch_may_have_an_input_tile_of_its_own():
    geometry = geometry_for(50, 7, (13, 18), 32, 3, "zeros", False)
    assert geometry.input_tile != geometry.tile
    compare_plans(random_index(1, 13 * 18, 50, 7, 0.5, 0), geometry)


def test_other_tiles_and_regions():
    geometry = plan_geometry(
        20, 3, (9, 11), 8, 3, "zeros", tile=Tile(2, 2, 8), input_tile=Tile(3, 5, 8), region=(4, 6)
    )  # fmt: skip
    compare_plans(random_index(1, 99, 20, 3, 0.0, 0), geometry)


def test_statistics_are_those_of_the_cpu():
    geometry = plan_geometry(50, 6, (10, 12), 8, 3, "zeros")
    index = random_index(1, 120, 50, 6, 0.7, 3)
    here, there = plan_statistics(make_plan(index, geometry)), plan_statistics(make_plan(index.cpu(), geometry))
    for a, b in zip((*here.columns, here.useful, *here.touched), (*there.columns, there.useful, *there.touched), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_plan_in_a_graph_follows_the_index():
    from smoe_hpc.kernels.cuda.selection import select_cuda

    geometry = plan_geometry(96, 24, (16, 16), 8, 3, "zeros")
    values = make_values((96, 16, 16), "normal", 0).to(DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        make_plan(select_cuda(values, 24, "id"), geometry)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = make_plan(select_cuda(values, 24, "id"), geometry)
    values.copy_(make_values((96, 16, 16), "normal", 1))
    graph.replay()
    expected = plan_reference(to_index(select_experts(values.cpu(), 24, "id").indices), geometry)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(plan.tensors(), expected, strict=True))


def test_a_graph_uses_the_plan_made_before_it_and_keeps_its_own_to_itself():
    values = make_values((96, 64, 64), "normal", 0).to(DEVICE)
    of_layer = (torch.bfloat16, 8, (96, 1, 64, 3, 3), "zeros")
    planned, other = (select_experts(values, 24, "id") for _ in range(2))
    made = planned.plan(*of_layer)
    assert made
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert planned.plan(*of_layer) is made
        captured = other.plan(*of_layer)
        assert other.plan(*of_layer) is captured
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second):
        of_second = other.plan(*of_layer)
    assert of_second is not captured
    second.replay()  # the first one never was
    assert all(torch.equal(a, b) for a, b in zip(of_second, made, strict=True))
    assert other.plan(*of_layer) is not captured
    assert other.plan(*of_layer) is not of_second
    assert all(torch.equal(a, b) for a, b in zip(other.plan(*of_layer), made, strict=True))
    read, unread = weakref.ref(planned.choice), weakref.ref(other.choice)
    del planned, other
    gc.collect()
    assert read() is not None  # the first graph reads it whenever it is replayed
    assert unread() is None


def test_indices_by_pixel():
    for shape in ((5, 3, 7), (3, 128, 4, 9), (40, 33, 2)):
        indices = torch.randint(1000, shape)
        assert torch.equal(to_index(indices.to(DEVICE)).cpu(), to_index(indices))
    far = torch.tensor([1 << 40, 3]).view(2, 1, 1).to(DEVICE)
    assert to_index(far).flatten().tolist() == [-1, 3]


@pytest.mark.parametrize("channels", [1, 7, 8, 33, 128, 1000])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_packing(channels, size):
    from smoe_hpc.kernels.cuda.packing import TYPES, pack_weight, padded_channels, unpack_gradient

    for source in TYPES:
        weight = torch.randn(9, 3, channels, size, size, device=DEVICE).to(source)
        for target in TYPES:
            rows = weight.flatten(0, 1).flatten(2).transpose(1, 2)
            expected = torch.nn.functional.pad(rows, (0, padded_channels(channels) - channels)).to(target)
            assert torch.equal(pack_weight(weight, target), expected)
        packed = torch.randn(27, size * size, padded_channels(channels), device=DEVICE)
        expected = packed[..., :channels].transpose(1, 2).reshape(weight.shape).to(source)
        assert torch.equal(unpack_gradient(packed, weight.shape, source), expected)
