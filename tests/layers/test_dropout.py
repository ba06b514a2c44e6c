"""Dropout by counter: what its mask depends on, and how it is distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.layers import CounterDropout, begin_step

SHAPE = (6, 8, 16)  # channels, rows, columns


def dropped(layer: CounterDropout, step: int, samples: Tensor, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    begin_step(layer, step, samples)
    return layer(torch.ones(len(samples), *shape)) == 0


def by_hand(seed: int, number: int, step: int, sample: int, element: int, p: float) -> bool:
    """The decision about one element in Python's whole numbers."""
    import hashlib

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    stride = 0x9E3779B97F4A7C15
    key = int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest(), "little")
    signed = stride - 2**64
    of_step = mix((key + step * signed % 2**62) % 2**64)
    hashed = mix((mix(of_step ^ (sample * stride % 2**64)) + of_step) % 2**64)
    factor, offset = hashed >> 32 | 1, hashed % 2**32
    value = (factor * (mix(element * stride % 2**64) >> 32) + offset) % 2**32
    value -= 2**32 if value >= 2**31 else 0
    return value < round(p * 2**32) - 2**31


def test_the_mask_is_the_hash_written_out():
    mask = dropped(CounterDropout(0.3, seed=5, layer=2), step=123456, samples=torch.tensor([0, 7, 40_000]))
    for place, sample in enumerate((0, 7, 40_000)):
        expected = [by_hand(5, 2, 123456, sample, element, 0.3) for element in range(mask[0].numel())]
        assert mask[place].flatten().tolist() == expected


def test_samples_are_dropped_alike_wherever_they_lie():
    layer = CounterDropout(0.5)
    whole = dropped(layer, 3, torch.arange(8))
    assert torch.equal(dropped(layer, 3, torch.tensor([6, 1])), whole[[6, 1]])
    begin_step(layer, 3)  # positions 0, 1, 2, ...
    assert torch.equal(layer(torch.ones(8, *SHAPE)) == 0, whole)
    last = torch.ones(8, *SHAPE).contiguous(memory_format=torch.channels_last)
    begin_step(layer, 3, torch.arange(8))
    assert torch.equal(layer(last) == 0, whole)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(last.double()) == 0, whole)
    assert torch.equal(layer(last.bfloat16()) == 0, whole)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_is_p_in_all_directions(p: float):
    mask = dropped(CounterDropout(p, seed=1), 0, torch.arange(64), (32, 16, 32)).double()
    n = mask.numel()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(float(mask.mean()) - p) < 5 * sigma / n**0.5
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        means = mask.mean(dims)
        assert float((means - p).abs().max()) < 5 * sigma / (n / len(means)) ** 0.5


def test_decisions_are_not_correlated():
    p, samples = 0.3, torch.arange(256)
    layers = [CounterDropout(p, seed=seed, layer=number) for seed, number in ((0, 0), (0, 1), (1, 0))]
    masks = [dropped(layer, step, samples) for layer in layers for step in (0, 1, 2)]
    rows = torch.stack([mask.flatten().double() - p for mask in masks]) / (p * (1 - p)) ** 0.5
    between = rows @ rows.T / rows.shape[1] - torch.eye(len(rows))
    assert float(between.abs().max()) < 5 / rows.shape[1] ** 0.5  # layers, seeds, steps
    elements = rows[0].view(256, -1)
    pairs = elements.T @ elements / 256
    pairs.fill_diagonal_(0.0)
    count = len(pairs)
    assert abs(float(pairs.square().mean()) * 256 * count / (count - 1) - 1.0) < 0.05  # as independent ones have it
    neighbours = (elements[:, 1:] * elements[:, :-1]).mean()
    assert abs(float(neighbours)) < 5 / elements.numel() ** 0.5
    following = (elements[1:] * elements[:-1]).mean()  # one sample and the next
    assert abs(float(following)) < 5 / elements.numel() ** 0.5


def test_what_is_kept_is_scaled_and_the_gradient_follows():
    layer = CounterDropout(0.25)
    begin_step(layer, 0, torch.arange(4))
    x = torch.randn(4, *SHAPE, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    torch.testing.assert_close(x.grad, kept.double() / 0.75)


def test_recomputation_drops_alike():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), CounterDropout(0.5, layer=0), nn.Conv2d(6, 6, 1), CounterDropout(0.5, layer=1))
    begin_step(model, 9, torch.arange(2))
    x = torch.randn(2, *SHAPE)
    grads = []
    for recomputed in (False, True):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
        grads.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_evaluation_and_p_of_zero_drop_nothing():
    x = torch.ones(2, *SHAPE)
    assert CounterDropout(0.5).eval()(x) is x
    assert CounterDropout(0.0)(x) is x


def test_a_step_that_was_not_begun_is_refused():
    layer = CounterDropout(0.5)
    with pytest.raises(SmoeError, match="begin_step"):
        layer(torch.ones(2, *SHAPE))
    begin_step(layer, 0, torch.arange(3))
    with pytest.raises(SmoeError, match="given 2 samples but begin_step told it of 3"):
        layer(torch.ones(2, *SHAPE))
    with pytest.raises(ConfigError, match=r"p=1\.0"):
        CounterDropout(1.0)


@pytest.mark.gpu
def test_a_gpu_drops_what_a_cpu_does():
    layer, samples = CounterDropout(0.1, seed=4, layer=7), torch.arange(16)
    expected = dropped(layer, 77, samples, (128, 32, 64))
    layer.cuda()
    begin_step(layer, 77, samples.cuda())
    assert torch.equal((layer(torch.ones(16, 128, 32, 64, device="cuda")) == 0).cpu(), expected)
