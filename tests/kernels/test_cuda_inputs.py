"""What cannot be is refused in one sentence, what is merely odd is computed; on a CPU and on a GPU alike.

A GPU's indices are looked through once for each tensor, and those that select_experts made not at all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import expert_conv2d, select_experts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU = pytest.mark.gpu
B, C, H, W, N, K, FILTERS = 2, 8, 6, 8, 5, 3, 2


def good(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, H, W, generator=generator)
    weight = torch.randn(N, FILTERS, C, 3, 3, generator=generator)
    indices = select_experts(torch.randn(N, H, W, generator=generator), K).indices
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype), "indices": indices.to(device)}


def exact(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    filters = weight.shape[1]
    every = F.conv2d(x.double(), weight.flatten(0, 1).double(), padding=weight.shape[-1] // 2).unflatten(1, (-1, filters))
    return every.gather(1, indices.expand(len(x), -1, -1, -1).unsqueeze(2).expand(-1, -1, filters, -1, -1)).flatten(1, 2)


def assert_near(found: Tensor, right: Tensor, tolerance: float = 1e-6) -> None:
    off, norm = (found.double() - right.double()).norm(), right.double().norm()
    assert off <= tolerance * norm, f"off by {off / norm:.2e}"


WRONG: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "input without batch": lambda t: {"x": t["x"][0]},
    "weight without filters": lambda t: {"weight": t["weight"][:, 0]},
    "indices without selections": lambda t: {"indices": t["indices"][0]},
    "indices with two leading dimensions": lambda t: {"indices": t["indices"].expand(1, 1, -1, -1, -1)},
    "channels of input and weight": lambda t: {"x": t["x"][:, 1:]},
    "even kernel": lambda t: {"weight": t["weight"][..., :2, :2]},
    "kernel not square": lambda t: {"weight": t["weight"][..., :1]},
    "indices of another grid": lambda t: {"indices": t["indices"][..., 1:]},
    "indices of another batch": lambda t: {"indices": t["indices"].expand(B + 1, -1, -1, -1)},
    "more selected than there are": lambda t: {"indices": torch.cat([t["indices"]] * 2)},
    "indices in floating point": lambda t: {"indices": t["indices"].float()},
    "indices in 16 bits": lambda t: {"indices": t["indices"].short()},
    "no selections": lambda t: {"indices": t["indices"][:0]},
    "integer input": lambda t: {"x": t["x"].int()},
    "integer input and weight": lambda t: {"x": t["x"].int(), "weight": t["weight"].int()},
    "complex input and weight": lambda t: {"x": t["x"].cfloat(), "weight": t["weight"].cfloat()},
    "16-bit weight for a float32 input": lambda t: {"weight": t["weight"].half()},
    "two 16-bit types": lambda t: {"x": t["x"].half(), "weight": t["weight"].bfloat16()},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_go_together_is_refused(what: str, device: str):
    tensors = good(device)
    wrong = {**tensors, **WRONG[what](tensors)}
    with pytest.raises(ConfigError) as caught:
        expert_conv2d(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["reflect", "", "Zeros"])
def test_an_unknown_padding_is_refused(padding: str, device: str):
    with pytest.raises(ConfigError, match="padding"):
        expert_conv2d(**good(device), padding=padding)


@pytest.mark.parametrize("device", DEVICES)
def test_a_grid_that_cannot_wrap_is_refused(device: str):
    tensors = good(device)
    odd = {**tensors, "x": tensors["x"][..., :7], "indices": tensors["indices"][..., :7]}
    with pytest.raises(ConfigError, match="sphere"):
        expert_conv2d(**odd, padding="sphere")
    assert_near(expert_conv2d(**odd), exact(**odd))


@GPU
@pytest.mark.parametrize("away", [("x",), ("weight",), ("indices",), ("x", "weight"), ("weight", "indices")], ids="-".join)
def test_tensors_on_two_devices_are_refused(away: tuple[str, ...]):
    tensors = good("cuda")
    with pytest.raises(ConfigError, match="device"):
        expert_conv2d(**{name: t.cpu() if name in away else t for name, t in tensors.items()})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [-1, N, 2**40, -(2**63)])
def test_experts_that_there_are_not_are_refused(device: str, bad: int):
    tensors = good(device)
    expert_conv2d(**tensors)
    tensors["indices"][1, 2, 3] = bad  # written to after it was found right
    with pytest.raises(ConfigError, match=f"num_experts={N}"):
        expert_conv2d(**tensors)


@GPU
def test_an_expert_that_a_pixel_selects_twice_is_refused():
    tensors = good("cuda")
    tensors["indices"][1, 2, 3] = tensors["indices"][0, 2, 3]
    with pytest.raises(ConfigError, match="twice"):
        expert_conv2d(**tensors)


@GPU
def test_a_choice_of_our_own_is_not_read_back():
    tensors, values = good("cuda"), torch.randn(N, H, W, device="cuda")
    expert_conv2d(**tensors)  # whatever is set up at the first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert_conv2d(tensors["x"], tensors["weight"], select_experts(values, K).choice)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["zeros", "sphere"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_an_empty_batch(device: str, dtype: torch.dtype, padding: str, per_sample: bool):
    tensors = good(device, dtype)
    x, weight = tensors["x"][:0].requires_grad_(), tensors["weight"].requires_grad_()
    indices = tensors["indices"].expand(0, -1, -1, -1) if per_sample else tensors["indices"]
    y = expert_conv2d(x, weight, indices, padding=padding)
    assert y.shape == (0, K * FILTERS, H, W)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.zeros_like(y))
    assert grad_x.shape == x.shape
    assert grad_weight.shape == weight.shape
    assert not grad_weight.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_grids_smaller_than_a_tile_or_a_filter(device: str, grid: tuple[int, int], size: int):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, *grid, generator=generator).to(device).requires_grad_()
    weight = torch.randn(6, 1, 4, size, size, generator=generator).to(device).requires_grad_()
    indices = select_experts(torch.randn(6, *grid, generator=generator), 2).indices.to(device)
    y, right = expert_conv2d(x, weight, indices), exact(x, weight, indices)
    assert_near(y, right)
    grad = torch.randn(y.shape, generator=generator).to(device)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(right, (x, weight), grad.double()), strict=True
    ):
        assert_near(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinities_and_nans_stay_where_they_belong(device: str, dtype: torch.dtype):
    tensors = good(device, dtype)
    tensors["x"][0, 0, 1, 1] = torch.nan
    tensors["x"][1, 0, 4, 6] = torch.inf
    y = expert_conv2d(**tensors)
    reached = torch.zeros(B, H, W, dtype=torch.bool, device=device)
    reached[0, :3, :3] = True
    reached[1, 3:6, 5:8] = True
    assert (y.isfinite().all(1) == ~reached).all()


@pytest.mark.parametrize("device", DEVICES)
def test_overlapping_and_expanded_tensors(device: str):
    """Strides of 0, as expand makes them: of the input, of the indices, and of the gradient that sum() sends back."""
    tensors = good(device)
    x = tensors["x"][:1].expand(3, -1, -1, -1)
    indices = tensors["indices"].expand(3, -1, -1, -1)
    weight = tensors["weight"].requires_grad_()
    y = expert_conv2d(x, weight, indices)
    right = exact(x, weight, indices)
    assert_near(y, right)
    assert_near(torch.autograd.grad(y.sum(), weight)[0], torch.autograd.grad(right.sum(), weight)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_not_aligned(device: str, dtype: torch.dtype):
    tensors = good(device, dtype)
    for name in ("x", "weight"):
        shifted = torch.empty(tensors[name].numel() + 1, dtype=dtype, device=device)[1:].view(tensors[name].shape)
        tensors[name] = shifted.copy_(tensors[name])
    assert_near(expert_conv2d(**tensors), exact(**tensors), 1e-6 if dtype == torch.float32 else 2e-2)


@GPU
@pytest.mark.slow
def test_more_than_two_thousand_million_elements():
    """Input and output of 2**31 elements and more, in bfloat16; each sample as by itself, all summed in the weights."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    batch, channels, grid = 65, 128, (512, 512)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, channels, *grid, device="cuda", dtype=torch.bfloat16, generator=generator)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    assert x.numel() > 2**31
    weight = (torch.randn(160, 1, channels, 3, 3, device="cuda", generator=generator) / 34).bfloat16().requires_grad_()
    indices = select_experts(torch.randn(160, *grid, device="cuda", generator=generator), channels).indices
    y = expert_conv2d(x, weight, indices)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), x.detach())
    total = torch.zeros(weight.shape, device="cuda", dtype=torch.float64)
    for first in range(0, batch, 13):
        some = x.detach()[first : first + 13].requires_grad_()
        part = expert_conv2d(some, weight, indices)
        assert torch.equal(part, y[first : first + 13])
        of_some, of_weight = torch.autograd.grad(part, (some, weight), some.detach())
        assert torch.equal(of_some, grad_x[first : first + 13])
        total += of_weight.double()
    assert_near(grad_weight, total, 4e-3)


@GPU
def test_more_than_two_thousand_million_places_in_the_weights():
    """2**31 numbers of weights: offsets into them are 64 bits wide too."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    experts, channels, grid = 60000, 4096, (4, 8)
    weight = torch.zeros(experts, 1, channels, 3, 3, device="cuda", dtype=torch.bfloat16)
    assert weight.numel() > 2**31
    indices = torch.randperm(experts, device="cuda")[: 8 * 32].view(8, *grid)
    weight[indices.flatten()] = torch.randn(8 * 32, 1, channels, 3, 3, device="cuda").bfloat16() / 192
    x = torch.randn(2, channels, *grid, device="cuda", dtype=torch.bfloat16)
    used = weight[indices.flatten()]
    here = torch.arange(8 * 32, device="cuda").view(8, *grid)
    with torch.no_grad():
        assert_near(expert_conv2d(x, weight, indices), exact(x, used, here), 3e-3)
