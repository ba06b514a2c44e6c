"""The plan of a routing, held against its definition written out pixel by pixel."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import select_experts
from smoe_hpc.kernels.planning.geometry import Geometry, geometry_for, plan_geometry
from smoe_hpc.kernels.planning.making import geometry_of, make_plan, to_index
from smoe_hpc.kernels.planning.plan import Plan, Windows
from smoe_hpc.kernels.planning.statistics import plan_statistics
from smoe_hpc.kernels.planning.tiles import Tile, tile_for

GRAY = {place ^ (place >> 1): place for place in range(1 << 16)}
OUTSIDE = 0xFFFF


def random_index(choices: int, pixels: int, num_experts: int, selected: int, seed: int = 0) -> torch.Tensor:
    keys = torch.rand(choices, pixels, num_experts, generator=torch.Generator().manual_seed(seed))
    return keys.argsort(-1)[..., :selected].to(torch.int32).contiguous()


def tap_reads(geometry: Geometry, pixel: tuple[int, int], tap: tuple[int, int]) -> tuple[int, int] | None:
    """The output pixel whose gradient this tap carries to this input pixel, before wrapping; None off the map."""
    h, w = (p + geometry.offset - t for p, t in zip(pixel, tap, strict=True))
    inside = 0 <= h < geometry.grid[0] and (geometry.wrap or 0 <= w < geometry.grid[1])
    return (h, w) if inside else None


def expected_selections(geometry: Geometry, index: np.ndarray, kind: str, window: Windows, place: tuple[int, int]):
    """Window pixel -> output pixel, and expert -> mask, of one window."""
    columns = geometry.grid[1]
    pixels: dict[int, int] = {}
    masks: dict[int, int] = defaultdict(int)
    top, left = (p * s for p, s in zip(place, window.step, strict=True))
    if kind == "input_grad":
        size, tile = geometry.kernel_size, geometry.input_tile
        for r in range(top, min(top + tile.rows, geometry.input_grid[0])):
            for c in range(left, min(left + tile.columns, geometry.input_grid[1])):
                for i in range(size):
                    for j in range(size):
                        read = tap_reads(geometry, (r, c), (i, j))
                        if read is None:
                            continue
                        u, v = read[0] - top - window.first, read[1] - left - window.first
                        pixels[u * window.size[1] + v] = read[0] * columns + read[1] % columns
                        for expert in index[read[0] * columns + read[1] % columns]:
                            masks[int(expert)] |= 1 << (i * size + j) if size <= 4 else 0xFFFF
        return pixels, masks
    tile = geometry.tile if kind == "weight_grad" else Tile(*window.size, 1)
    for h in range(top, min(top + window.size[0], geometry.grid[0])):
        for w in range(left, min(left + window.size[1], geometry.grid[1])):
            pixels[(h - top) * window.size[1] + w - left] = h * columns + w
            sub = (h - top) // tile.rows * (window.size[1] // tile.columns) + (w - left) // tile.columns
            for expert in index[h * columns + w]:
                masks[int(expert)] |= 1 << sub
    return pixels, masks


def check_windows(geometry: Geometry, index: torch.Tensor, kind: str, windows: Windows) -> None:
    assert windows.capacity % 16 == 0
    for choice in range(geometry.choices):
        chosen = index[choice].numpy()
        for tile in range(windows.tiles[0] * windows.tiles[1]):
            place = divmod(tile, windows.tiles[1])
            pixels, masks = expected_selections(geometry, chosen, kind, windows, place)
            masks = {expert: mask for expert, mask in masks.items() if 0 <= expert < geometry.num_experts}
            if kind == "weight_grad":
                listed = sorted(masks, key=lambda expert: (GRAY[masks[expert]], expert))
            else:
                listed = sorted(masks, key=lambda expert: (-masks[expert].bit_count(), masks[expert], expert))
            assert windows.counts[choice, tile] == len(listed)
            rest = [0] * (windows.capacity - len(listed))
            assert windows.experts[choice, tile].tolist() == listed + rest
            if windows.masks is not None:
                held = windows.masks[choice, tile].numpy().view(np.uint16).tolist()
                assert held == [masks[expert] for expert in listed] + rest
            slots = windows.slots[choice, tile].numpy().view(np.uint16)
            expected = np.full_like(slots, OUTSIDE)
            for position, pixel in pixels.items():
                expected[position] = [listed.index(e) if e in masks else OUTSIDE for e in chosen[pixel]]
            np.testing.assert_array_equal(slots, expected)


def check_plan(index: torch.Tensor, geometry: Geometry) -> Plan:
    plan = make_plan(index, geometry)
    for kind in ("forward", "input_grad", "weight_grad"):
        check_windows(geometry, index, kind, getattr(plan, kind))
    assert [(tuple(t.shape), t.dtype) for t in plan.tensors()] == geometry.shapes()
    assert all(t.is_contiguous() for t in plan.tensors())
    assert sum(t.numel() * t.element_size() for t in plan.tensors()) == plan.num_bytes()
    return plan


def make_geometry(which: str, *sizes, per_sample: bool = False) -> Geometry:
    """The windows of a plan by default, or those that a layer uses."""
    make = {"default": plan_geometry, "layer": geometry_for}[which]
    return make(*sizes, per_sample=per_sample)


@pytest.mark.parametrize("which", ["default", "layer"])
@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize(
    ("num_experts", "selected", "grid", "batch", "kernel_size"),
    [(9, 3, (8, 8), 8, 3), (40, 5, (7, 10), 8, 3), (5, 5, (9, 6), 32, 3), (3, 1, (5, 4), 3, 1), (30, 2, (17, 18), 1, 3),
     (20, 4, (6, 6), 16, 5), (300, 2, (4, 2), 4, 3), (7, 2, (1, 2), 2, 1)],
)  # fmt: skip
def test_plan_is_its_definition(num_experts, selected, grid, batch, kernel_size, padding, which):
    geometry = make_geometry(which, num_experts, selected, grid, batch, kernel_size, padding)
    check_plan(random_index(1, grid[0] * grid[1], num_experts, selected), geometry)


@pytest.mark.parametrize(
    ("num_experts", "selected", "grid", "batch", "tile", "input_tile", "region"),
    [(9, 2, (9, 14), 32, Tile(2, 2, 32), Tile(4, 4, 8), (4, 8)), (9, 2, (9, 14), 16, Tile(2, 4, 16), Tile(4, 4, 8), (4, 8)),
     (3, 1, (64, 256), 8, Tile(4, 4, 8), Tile(4, 4, 8), (16, 16)), (3, 1, (64, 256), 32, Tile(2, 2, 32), Tile(4, 4, 8), (8, 8)),
     (3, 1, (64, 256), 1, Tile(8, 16, 1), Tile(8, 16, 1), (16, 16))],
)  # fmt: skip
def test_windows_of_the_layer_that_differ_from_the_default(num_experts, selected, grid, batch, tile, input_tile, region):
    # Many samples have an input tile of their own and, on a coarse grid, smaller regions; a grid of 64x256 where tiles list
    # most experts has larger ones.
    geometry = geometry_for(num_experts, selected, grid, batch, 3, "periodic_longitude", False)
    assert (geometry.tile, geometry.input_tile, geometry.region) == (tile, input_tile, region)
    check_plan(random_index(1, grid[0] * grid[1], num_experts, selected), geometry)


@pytest.mark.parametrize("which", ["default", "layer"])
def test_each_sample_its_own_choice(which):
    geometry = make_geometry(which, 12, 3, (5, 9), 3, 3, "periodic_longitude", per_sample=True)
    assert geometry.choices == 3
    assert geometry.tile == Tile(8, 16, 1)
    check_plan(random_index(3, 45, 12, 3), geometry)


def test_other_tiles_and_regions():
    geometry = plan_geometry(
        20, 3, (9, 11), 8, 3, "zeros", tile=Tile(2, 2, 8), input_tile=Tile(3, 5, 8), region=(4, 6)
    )  # fmt: skip
    check_plan(random_index(1, 99, 20, 3), geometry)


def test_numbers_out_of_range_are_left_out():
    geometry = plan_geometry(10, 3, (4, 5), 8, 3, "periodic_longitude")
    index = random_index(1, 20, 10, 3)
    index[0, 3, 1], index[0, 7, 0], index[0, 9, 2] = -1, 10, 1 << 30
    check_plan(index, geometry)


def test_same_indices_same_plan():
    geometry = plan_geometry(50, 7, (12, 13), 8, 3, "zeros")
    index = random_index(1, 156, 50, 7)
    first, second = make_plan(index, geometry), make_plan(index.clone(), geometry)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    again = Plan.from_tensors(geometry, first.tensors())
    assert again.weight_grad.slots is first.weight_grad.slots
    assert again.input_grad.size == (6, 6)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (16, 16), (32, 32), (48, 16), (33, 8), (64, 32), (100, 32)],
)  # fmt: skip
def test_tile_suits_the_batch(batch, samples):
    tile = tile_for(batch)
    assert tile.batch == samples
    assert tile.rows * tile.columns * tile.batch == 128
    assert tile_for(batch, per_sample=True).batch == 1


def test_a_plan_tells_what_it_is_for():
    sizes = (20, 4, (8, 12), 8, 3)
    tensors = make_plan(random_index(1, 96, 20, 4), geometry_for(*sizes, "zeros", False)).tensors()
    assert geometry_of(tensors, *sizes, "zeros", False) is geometry_for(*sizes, "zeros", False)
    for others in [(*sizes, "periodic_longitude"), (24, *sizes[1:], "zeros"), (*sizes[:4], 1, "zeros")]:
        with pytest.raises(ConfigError, match="the plan is not for"):
            geometry_of(tensors, *others, False)
    odd = plan_geometry(*sizes, "zeros", tile=Tile(4, 8, 4), input_tile=Tile(4, 4, 8), region=(8, 16))
    assert geometry_of(make_plan(random_index(1, 96, 20, 4), odd).tensors(), *sizes, "zeros", False) == odd


def test_index_from_indices():
    values = torch.randn(2, 9, 4, 6, generator=torch.Generator().manual_seed(1))
    routing = select_experts(values, 4)
    index = to_index(routing.indices)
    assert index.dtype == torch.int32
    assert index.is_contiguous()
    for sample, pixel in [(0, 0), (1, 7), (1, 23)]:
        assert index[sample, pixel].tolist() == routing.indices[sample, :, pixel // 6, pixel % 6].tolist()
    assert torch.equal(to_index(routing.indices[0]), index[:1])
    by_pixel = index.unflatten(1, (4, 6)).permute(0, 3, 1, 2)  # as a GPU's choice lies
    assert to_index(by_pixel).data_ptr() == to_index(by_pixel[0]).data_ptr() == index.data_ptr()


def test_statistics():
    geometry = plan_geometry(16, 4, (8, 8), 8, 3, "zeros")
    alike = torch.arange(4, dtype=torch.int32).expand(1, 64, 4).contiguous()
    statistics = plan_statistics(make_plan(alike, geometry))
    assert [float(c) for c in statistics.columns] == [4, 4, 4]
    assert float(statistics.useful) == 1
    assert [float(t) for t in statistics.touched] == [1, 1]
    mixed = plan_statistics(make_plan(random_index(1, 64, 16, 4), geometry))
    assert float(mixed.columns[0]) > 14
    assert 0.25 <= float(mixed.useful) < 0.29


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="num_experts=70000"):
        plan_geometry(70000, 4, (8, 8), 8, 3, "zeros")
    with pytest.raises(ConfigError, match="selected=5 of num_experts=4"):
        plan_geometry(4, 5, (8, 8), 8, 3, "zeros")
    with pytest.raises(ConfigError, match="batch=0"):
        plan_geometry(4, 2, (8, 8), 0, 3, "zeros")
    with pytest.raises(ConfigError, match="region 6x8 must be whole tiles of 4x4"):
        plan_geometry(4, 2, (8, 8), 8, 3, "zeros", region=(6, 8))
    with pytest.raises(ConfigError, match="region 32x32"):
        plan_geometry(4, 2, (8, 8), 8, 3, "zeros", region=(32, 32))
    with pytest.raises(ConfigError, match=r"the plan needs \(1, 64, 2\) int32"):
        make_plan(torch.zeros(1, 64, 2, dtype=torch.int64), plan_geometry(4, 2, (8, 8), 8, 3, "zeros"))
