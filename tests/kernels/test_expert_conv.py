import pytest
import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import expert_conv2d, fallback, reference
from smoe_hpc.kernels.build import libraries
from smoe_hpc.kernels.padding import pad

SHAPES = [  # B, C, H, W, N, K, F, k
    (2, 1, 5, 6, 3, 1, 1, 3),
    (1, 3, 4, 4, 5, 2, 1, 3),
    (2, 2, 3, 8, 4, 2, 3, 3),
    (2, 1, 4, 6, 2, 2, 1, 3),
    (1, 2, 5, 6, 6, 3, 2, 1),
    (1, 1, 6, 6, 4, 1, 1, 5),
    (1, 40, 3, 4, 5, 3, 1, 3),
    (5, 9, 7, 11, 4, 4, 2, 3),
    (3, 17, 2, 2, 3, 1, 5, 5),
    (9, 4, 5, 10, 8, 7, 1, 3),
]


@pytest.fixture(params=["native", "torch"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the compiled kernel and with plain torch."""
    if request.param == "native" and libraries.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("SMOE_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_loop_forward_and_backward(shape: tuple[int, ...], padding: str, per_sample: bool):
    b, c, h, w, n, k, f, size = shape
    if padding == "sphere" and w % 2:
        padding = "periodic_longitude"
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(b, c, h, w, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(n, f, c, size, size, dtype=torch.float64, generator=generator, requires_grad=True)
    chance = torch.rand(b, n, h, w, generator=generator) if per_sample else torch.rand(n, h, w, generator=generator)
    indices = chance.argsort(-3)[..., :k, :, :]
    y = expert_conv2d(x, weight, indices, padding=padding)
    expected = reference.expert_conv2d_loop(x, weight, indices, padding=padding)
    torch.testing.assert_close(y, expected)
    g = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradcheck(shape: tuple[int, ...]):
    b, c, h, w, n, k, f, size = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, c, h, w, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(n, f, c, size, size, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.rand(n, h, w, generator=generator).argsort(0)[:k]
    assert torch.autograd.gradcheck(lambda x, weight: expert_conv2d(x, weight, indices), (x, weight))


def test_an_empty_batch_gives_an_empty_output():
    weight = torch.randn(4, 1, 2, 3, 3, requires_grad=True)
    y = expert_conv2d(torch.zeros(0, 2, 5, 6), weight, torch.zeros(2, 5, 6, dtype=torch.int64))
    assert y.shape == (0, 2, 5, 6)


def a_large_case(dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, indices and a gradient of the output: 32x64, B 6, N 20, K 6, F 2."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(6, channels, 32, 64, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(20, 2, channels, 3, 3, dtype=torch.float64, generator=generator).to(dtype)
    indices = torch.rand(20, 32, 64, generator=generator).argsort(0)[:6]
    return x, weight, indices, torch.randn(6, 12, 32, 64, dtype=torch.float64, generator=generator).to(dtype)


def all_results(x: Tensor, weight: Tensor, indices: Tensor, g: Tensor, **options: str) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = expert_conv2d(x, weight, indices, **options)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


BOUNDS = [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 2.5e-4)]  # of 16 bits: what rounding once costs


def assert_near_exact(case: tuple[Tensor, ...], bound: float) -> None:
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case]
    for ours, expected in zip(all_results(*case), all_results(*exact), strict=True):
        assert ours.dtype == case[0].dtype
        assert (ours - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_rounding_is_small(channels: int, dtype: torch.dtype, bound: float, form: str):
    library_sums = form == "torch" and dtype == torch.float32  # of 2,048 pixels of each sample, in an order of its own
    assert_near_exact(a_large_case(dtype, channels), 4 * bound if library_sums else bound)


@pytest.mark.parametrize(("channels", "filters", "size"), [(64, 1, 3), (64, 1, 5), (16, 3, 3), (64, 8, 5)])
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_many_taps_are_rounded_once(channels: int, filters: int, size: int, dtype: torch.dtype, bound: float):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, channels, 12, 16, generator=generator).to(dtype)
    weight = torch.randn(5, filters, channels, size, size, generator=generator).to(dtype)
    indices = torch.rand(5, 12, 16, generator=generator).argsort(0)[:1]
    assert_near_exact((x, weight, indices, torch.randn(2, filters, 12, 16, generator=generator).to(dtype)), bound)


@pytest.mark.parametrize("channels", [3, 20])
def test_weights_of_float32_beside_16_bits_get_their_gradient_unrounded(channels: int):
    x, weight, indices, g = a_large_case(torch.bfloat16, channels)
    wide = weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_conv2d(x, wide, indices)
    (ours,) = torch.autograd.grad(y, wide, g)
    expected = all_results(x.double(), weight.double(), indices, g.double())[2]
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indices_may_be_int32_and_lie_pixel_by_pixel(dtype: torch.dtype):
    x, weight, indices, g = a_large_case(dtype, 4)
    by_pixel = indices.to(torch.int32).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for ours, theirs in zip(all_results(x, weight, by_pixel, g), all_results(x, weight, indices, g), strict=True):
        assert torch.equal(ours, theirs)


def test_layouts_that_are_not_contiguous():
    x, weight, indices, g = a_large_case(torch.float64, 10)
    expected = all_results(x, weight, indices, g)
    odd = (
        x.transpose(2, 3).contiguous().transpose(2, 3),
        weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        indices.flip(2).contiguous().flip(2).expand(1, -1, -1, -1).transpose(1, 3).contiguous().transpose(1, 3)[0],
        g.to(memory_format=torch.channels_last),
    )
    for ours, theirs in zip(all_results(*odd), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    spread = torch.ones((), dtype=torch.float64).expand(g.shape)  # as the gradient of a sum is
    expected = all_results(x, weight, indices, spread.clone())
    for ours, theirs in zip(all_results(x, weight, indices, spread), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [2, 10])
def test_an_expert_that_a_pixel_selects_twice_counts_twice(channels: int):
    x, weight, indices, g = a_large_case(torch.float64, channels)
    indices = (indices % 2).contiguous()
    got = all_results(x, weight, indices, g)
    torch.testing.assert_close(got[0], fallback.forward(x, weight, indices, "zeros"))
    expected = fallback.backward(g, x, weight, indices, "zeros", True, True)
    for ours, theirs in zip(got[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [2, 10])
def test_what_is_not_finite_is_seen_where_it_belongs(channels: int):
    x, weight, indices, g = a_large_case(torch.float32, channels)
    x[1, 0, 5, 9] = float("nan")
    y, _, dw = all_results(x, weight, indices, g)
    seen = y.isnan().flatten(0, 1).any(0)
    assert seen[4:7, 8:11].all()
    assert seen.sum() == 9
    assert dw[:, :, 1:].isfinite().all()
    assert dw[indices[:, 5, 9]][:, :, 0].isnan().any()
    g[0, 0, 3, 3] = float("inf")
    _, dx, _ = all_results(x, weight, indices, g)
    assert not dx[0, :, 2:5, 2:5].isfinite().any()
    assert dx[1:].isfinite().all()


@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize(("grid", "size"), [((5, 6), 3), ((4, 4), 5), ((2, 2), 5), ((3, 8), 7), ((4, 4), 1)])
def test_folding_is_the_adjoint_of_padding(padding: str, grid: tuple[int, int], size: int):
    if padding == "sphere" and grid[0] < size // 2:
        padding = "zeros"
    if padding == "periodic_longitude" and grid[1] < size // 2:
        padding = "zeros"
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    padded = pad(x, size, padding)
    g = torch.randn_like(padded)
    torch.testing.assert_close((g * padded).sum(), (fallback.fold(g, size, padding) * x).sum())


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_there_is_not_is_refused(expert: int):
    indices = torch.zeros(1, 3, 4, dtype=torch.int64)
    indices[0, 2, 3] = expert
    with pytest.raises(ConfigError, match="num_experts=4: give 0 to 3"):
        expert_conv2d(torch.zeros(1, 2, 3, 4), torch.zeros(4, 1, 2, 3, 3), indices)


BAD: list[tuple[dict[str, Tensor], str]] = [
    ({"indices": torch.zeros(5, 3, 4, dtype=torch.int64)}, "5 experts a pixel selected of 4"),
    ({"indices": torch.zeros(1, 3, 4, dtype=torch.int16)}, "torch.int64"),
    ({"indices": torch.zeros(1, 3, 5, dtype=torch.int64)}, "do not fit input"),
    ({"indices": torch.zeros(3, 1, 3, 4, dtype=torch.int64)}, "one choice for each sample"),
    ({"weight": torch.zeros(4, 1, 3, 3, 3)}, "an input of 2 channels"),
    ({"weight": torch.zeros(4, 1, 2, 3, 5)}, "does not fit"),
    ({"weight": torch.zeros(4, 1, 2, 2, 2)}, "use an odd size"),
    ({"weight": torch.zeros(4, 2, 3, 3)}, r"give \[B, C, H, W\]"),
    ({"weight": torch.zeros(4, 1, 2, 3, 3, dtype=torch.float64)}, "convert one of them: torch.autocast leaves float64 alone$"),
    ({"weight": torch.zeros(4, 1, 2, 3, 3, dtype=torch.bfloat16)}, "convert one of them, or use torch.autocast$"),
    ({"x": torch.zeros(2, 2, 3, 4, dtype=torch.int64)}, "are torch.float32; give both as torch.float32, .* or torch.float16$"),
    ({"x": torch.zeros(2, 2, 3, 4, dtype=torch.int64), "weight": torch.zeros(4, 1, 2, 3, 3, dtype=torch.int64)}, "give both"),
    ({"x": torch.zeros(2, 2, 3, 4).to_sparse()}, r"input \[2, 2, 3, 4\]: torch.sparse_coo is not served; give a dense tensor"),
    ({"weight": torch.zeros(4, 1, 2, 3, 3).to_sparse()}, r"weights \[4, 1, 2, 3, 3\]: torch.sparse_coo is not served"),
    ({"indices": torch.zeros(1, 3, 4, dtype=torch.int64).to_sparse()}, r"indices \[1, 3, 4\]: torch.sparse_coo is not served"),
    ({"weight": torch.zeros(4, 1, 2, 3, 3, device="meta")}, "move them to one device"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_go_together_is_refused(change: dict[str, Tensor], message: str):
    good = {
        "x": torch.zeros(2, 2, 3, 4),
        "weight": torch.zeros(4, 1, 2, 3, 3),
        "indices": torch.zeros(1, 3, 4, dtype=torch.int64),
    }
    with pytest.raises(ConfigError, match=message):
        expert_conv2d(**{**good, **change})


def test_autocast_is_no_remedy_where_it_is_on():
    x, weight, indices = torch.zeros(2, 2, 3, 4), torch.zeros(4, 1, 2, 3, 3), torch.zeros(1, 3, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ConfigError, match=r"input is torch.float64, .*; convert one of them: torch.autocast leaves"):
            expert_conv2d(x.double(), weight, indices)
        with pytest.raises(ConfigError, match=r"input is torch.int64.*; give both as torch.float32"):
            expert_conv2d(x.long(), weight.long(), indices)


def test_an_empty_batch_has_gradients():
    x, weight = torch.zeros(0, 6, 5, 6, requires_grad=True), torch.randn(4, 1, 6, 3, 3, requires_grad=True)
    expert_conv2d(x, weight, torch.zeros(2, 5, 6, dtype=torch.int64)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert weight.grad is not None
    assert not weight.grad.any()
