"""Three hundred random shapes and routings: forward and both gradients against float64, norm by norm.

What they may be off by is told in :mod:`tests.kernels.problems`. On a GPU every problem runs twice: as the sizes choose the
form, and by the tiled kernels whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from smoe_hpc.kernels import expert_conv2d, reference, select_experts
from smoe_hpc.kernels.planning import cost
from smoe_hpc.kernels.planning.geometry import plan_geometry
from smoe_hpc.kernels.planning.making import make_plan, to_index
from smoe_hpc.kernels.planning.tiles import Tile
from tests.kernels.problems import (
    AT_MOST,
    HALF,
    LAYOUTS,
    SINGLE,
    Problem,
    check_close,
    compiled,
    describe,
    draw,
    exact,
    expected,
    poison,
    results,
)

CASES = 300


@pytest.fixture
def _exact_float32():
    """Float32 on a GPU without tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def _tiles(monkeypatch: pytest.MonkeyPatch):
    """The tiled kernels whatever the sizes."""
    monkeypatch.setattr(cost, "prefers_tiles", lambda *sizes: True)


@pytest.fixture
def _deterministic():
    """Deterministic algorithms, under which torch also fills memory that nobody has written with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_draws_cover_what_they_should():
    problems = [draw(seed) for seed in range(CASES)]
    chosen, shapes = [p.indices for p in problems], [p.weight.shape for p in problems]
    assert {p.padding for p in problems} == {"zeros", "periodic_longitude", "sphere"}
    assert {p.layout for p in problems} == set(LAYOUTS)
    assert {shape[-1] for shape in shapes} == {1, 3, 5}
    share = {
        "K = N": [i.shape[-3] == s[0] > 1 for i, s in zip(chosen, shapes, strict=True)],
        "K = 1 of many": [i.shape[-3] == 1 < s[0] for i, s in zip(chosen, shapes, strict=True)],
        "per sample": [i.dim() == 4 for i in chosen],
        "F > 1": [s[1] > 1 for s in shapes],
        "odd sizes": [p.x.shape[2] % 2 == 1 for p in problems],
        "C not of 8": [p.x.shape[1] % 8 > 0 for p in problems],
    }
    assert all(sum(found) >= CASES // 12 for found in share.values()), {name: sum(found) for name, found in share.items()}


@pytest.mark.parametrize("seed", [3, 8, 21])
def test_the_exact_form_is_that_of_the_loop(seed: int):
    problem = draw(seed)
    first = problem.indices if problem.indices.dim() == 3 else problem.indices[:1]
    loop = reference.expert_conv2d_loop(problem.x[:1], problem.weight, first, padding=problem.padding)
    torch.testing.assert_close(exact(problem.x[:1], problem.weight, first, problem.padding), loop)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("seed", range(CASES))
def test_cpu(seed: int):
    problem = draw(seed)
    for dtype in (torch.float32, HALF[seed % 2])[: 2 if compiled() else 1]:
        given = problem.to(dtype, "cpu")
        found = results(given)
        check_close(found, expected(given), problem, describe(seed, problem, dtype))
        again = results(given)
        assert all(torch.equal(found[name], again[name]) for name in found), describe(seed, problem, dtype)


def check_on_gpu(seed: int, dtypes: Sequence[torch.dtype]) -> None:
    problem = draw(seed, large=True)
    for dtype in dtypes:
        given = problem.to(dtype, "cuda")
        right = expected(given)
        poison("cuda")
        check_close(results(given), right, problem, describe(seed, problem, dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("_exact_float32", "_tiles")
@pytest.mark.parametrize("seed", range(CASES))
def test_tiles_on_a_gpu(seed: int):
    check_on_gpu(seed, (torch.float32, *HALF))


@pytest.mark.gpu
@pytest.mark.usefixtures("_exact_float32")
@pytest.mark.parametrize("seed", range(CASES))
def test_on_a_gpu_as_the_sizes_choose(seed: int):
    check_on_gpu(seed, (torch.float32, HALF[seed % 2]))


@pytest.mark.gpu
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("filters", "selected"), [(3, 56), (3, 128), (6, 24), (17, 8), (32, 8), (48, 8), (5, 32)])
def test_filters_that_do_not_divide_the_channels_loaded_at_once(filters: int, selected: int, deterministic: bool):
    """Parts of 128 channels of the output then begin in the midst of an expert, and of the 16 bytes that hold eight of them."""
    generator = torch.Generator().manual_seed(filters)
    experts, grid = selected + 5, (9, 12)
    problem = Problem(
        torch.randn(8, 16, *grid, generator=generator, dtype=torch.float64),
        torch.randn(experts, filters, 16, 3, 3, generator=generator, dtype=torch.float64) / 12,
        select_experts(torch.randn(experts, *grid, generator=generator), selected).indices,
        torch.randn(8, selected * filters, *grid, generator=generator, dtype=torch.float64),
        "zeros",
        "channels_last",
    )
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        for dtype in HALF:
            given = problem.to(dtype, "cuda")
            right = expected(given)
            poison("cuda")
            check_close(results(given), right, problem, describe(filters, problem, dtype))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic", "_tiles")
@pytest.mark.parametrize("seed", range(0, CASES, 5))
def test_tiles_give_the_same_bits_again_when_deterministic(seed: int):
    problem = draw(seed, large=True)
    for dtype in (torch.float32, torch.bfloat16):
        given = problem.to(dtype, "cuda")
        found = results(given)
        for _ in range(3):
            again = results(given)
            assert all(torch.equal(found[name], again[name]) for name in found), describe(seed, problem, dtype)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "filters"), [(24, 1), (64, 8), (7, 3)])
def test_a_sample_gets_the_same_bits_in_a_batch_of_any_size(device: str, dtype: torch.dtype, channels: int, filters: int):
    """The batch decides the tiles; forward adds channels and taps in one order whatever they are."""
    if device == "cpu" and not compiled():
        pytest.skip("torch's own convolution blocks its sums by the batch")
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(32, channels, 9, 14, generator=generator).to(device, dtype)
    weight = torch.randn(30, filters, channels, 3, 3, generator=generator).to(device, dtype)
    indices = select_experts(torch.randn(30, 9, 14, generator=generator), 8).indices.to(device)
    whole = expert_conv2d(x, weight, indices)
    for batch in (1, 2, 3, 4, 8, 16, 31):
        assert torch.equal(expert_conv2d(x[-batch:], weight, indices), whole[-batch:]), f"batch {batch}"
    each = expert_conv2d(x, weight, indices.expand(32, -1, -1, -1).contiguous())  # as if every sample had chosen for itself
    assert torch.equal(each, whole)


@pytest.mark.gpu
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "experts", "selected", "filters"), [(128, 300, 128, 1), (64, 40, 8, 16), (24, 30, 8, 1)])
def test_tiles_of_any_shape_give_the_same_bits(dtype: torch.dtype, channels: int, experts: int, selected: int, filters: int):
    generator = torch.Generator().manual_seed(channels)
    grid, batch = (18, 21), 8
    x = torch.randn(batch, channels, *grid, generator=generator).to("cuda", dtype)
    weight = torch.randn(experts, filters, channels, 3, 3, generator=generator).to("cuda", dtype) / channels**0.5
    indices = select_experts(torch.randn(experts, *grid, generator=generator), selected, "id").indices.cuda()
    right = exact(x.double(), weight.double(), indices, "zeros")
    first = None
    for tile in (Tile(2, 2, 32), Tile(2, 4, 16), Tile(4, 4, 8), Tile(4, 8, 4), Tile(8, 8, 2), Tile(8, 16, 1)):
        geometry = plan_geometry(experts, selected, grid, batch, 3, "zeros", tile=tile)
        plan = make_plan(to_index(indices), geometry).tensors()
        poison("cuda")
        y = expert_conv2d(x, weight, indices, plan=plan)
        first = y if first is None else first
        assert (y.double() - right).norm() <= (SINGLE if dtype == torch.float32 else AT_MOST) * right.norm(), tile
        assert torch.equal(y, first), tile
