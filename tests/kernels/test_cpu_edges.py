"""The bindings of the CPU kernels where a kernel would divide by nothing, read no memory, or miss a sign."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import cpu, expert_conv2d, fallback
from smoe_hpc.kernels.build import libraries

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"B": 2, "C": 8, "H": 4, "W": 6, "N": 5, "K": 2, "F": 3}

pytestmark = pytest.mark.skipif(libraries.find_cxx() is None, reason="needs a C++ compiler")


def a_case(dtype: torch.dtype = torch.float64, **other: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weights, indices and a gradient of the output; of :data:`SIZES`, or other ones."""
    b, c, h, w, n, k, f = (other.get(letter, size) for letter, size in SIZES.items())
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    indices = torch.rand(n, h, w, generator=generator).argsort(0)[:k].contiguous()
    return normal(b, c, h, w), normal(n, f, c, 3, 3), indices, normal(b, k * f, h, w)


def both_ways(x: Tensor, weight: Tensor, indices: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients, in memory that holds something else before."""
    y = torch.full(g.shape, 7.0, dtype=x.dtype)
    dx, dw = torch.full(x.shape, 7.0, dtype=x.dtype), torch.full(weight.shape, 7.0, dtype=weight.dtype)
    cpu.forward(x, weight, indices, "zeros", y)
    cpu.backward(g, x, weight, indices, "zeros", dx, dw)
    return y, dx, dw


def run_apart(code: str) -> None:
    """Run code in a process of its own: what kills it must not kill the tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- nothing to compute ----------------------------------------------------------------------------------------------------


def test_sizes_of_zero_give_zeros():
    run_apart("from tests.kernels.test_cpu_edges import check_sizes_of_zero as check; check()")


def check_sizes_of_zero() -> None:
    for channels in (2, 8):  # up to four take another way through the kernels
        for letters in (*"BCHWKF", "BK", "HW", "NK"):
            for result in both_ways(*a_case(**{"C": channels, **dict.fromkeys(letters, 0)})):
                assert not result.any(), letters


@pytest.mark.parametrize("letter", "BF")
def test_indices_out_of_range_are_refused_where_there_is_nothing_to_compute(letter: str):
    x, weight, indices, g = a_case(**{letter: 0})
    indices[0, 1, 2] = 5
    with pytest.raises(ConfigError, match=r"indices hold 0\.\.5, num_experts=5"):
        both_ways(x, weight, indices, g)


def test_an_empty_batch_has_gradients():
    x, weight, indices, _ = a_case(B=0)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    dx, dw = torch.autograd.grad(expert_conv2d(x, weight, indices).sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))


# -- nothing to read -------------------------------------------------------------------------------------------------------


def test_tensors_without_memory_are_refused():
    run_apart("from tests.kernels.test_cpu_edges import check_no_memory as check; check()")


def check_no_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for place, what in enumerate(("input", "weights", "indices", "gradient")):
            case = a_case(dtype)
            case[place].untyped_storage().resize_(0)
            with pytest.raises(ConfigError, match=rf"{what} \[{case[place].shape[0]}, .* has no memory: its storage was freed"):
                both_ways(*case)
    x, weight, indices, g = a_case()
    with pytest.raises(ConfigError, match=r"gradient \[2, 6, 4, 6\] has no memory"):
        both_ways(x, weight, indices, torch._efficientzerotensor(g.shape, dtype=g.dtype))


# -- signs that are noted down ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_a_negated_tensor_has_its_sign(which: int, strided: bool):
    case = list(a_case())
    tensor = case[which]
    # The imaginary part of a conjugate is a view of the number's with the other sign.
    negated = torch.complex(tensor, tensor).conj().imag if strided else torch._neg_view(tensor)
    assert negated.is_neg()
    case[which] = negated
    x, weight, indices, g = (t.resolve_neg() for t in case)
    output = fallback.forward(x, weight, indices, "zeros")
    gradients = fallback.backward(g, x, weight, indices, "zeros", True, True)
    for ours, theirs in zip(both_ways(*case), (output, *gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_spectrum_of_a_field_may_be_convolved():
    x, weight, indices, _ = a_case()
    spectrum = torch.fft.fft2(x).conj().imag
    torch.testing.assert_close(expert_conv2d(spectrum, weight, indices), expert_conv2d(spectrum.clone(), weight, indices))
