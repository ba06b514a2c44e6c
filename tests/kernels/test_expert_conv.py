import pytest
import torch

from smoe_hpc.kernels import expert_conv2d, reference

SHAPES = [  # B, C, H, W, N, K, F, k
    (2, 1, 5, 6, 3, 1, 1, 3),
    (1, 3, 4, 4, 5, 2, 1, 3),
    (2, 2, 3, 8, 4, 2, 3, 3),
    (2, 1, 4, 6, 2, 2, 1, 3),
    (1, 2, 5, 6, 6, 3, 2, 1),
    (1, 1, 6, 6, 4, 1, 1, 5),
    (1, 40, 3, 4, 5, 3, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["zeros", "periodic_longitude", "sphere"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_loop_forward_and_backward(shape: tuple[int, ...], padding: str, per_sample: bool):
    b, c, h, w, n, k, f, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(b, c, h, w, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(n, f, c, size, size, dtype=torch.float64, generator=generator, requires_grad=True)
    chance = torch.rand(b, n, h, w, generator=generator) if per_sample else torch.rand(n, h, w, generator=generator)
    indices = chance.argsort(-3)[..., :k, :, :]
    y = expert_conv2d(x, weight, indices, padding=padding)
    expected = reference.expert_conv2d_loop(x, weight, indices, padding=padding)
    torch.testing.assert_close(y, expected)
    g = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True
    ):
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
