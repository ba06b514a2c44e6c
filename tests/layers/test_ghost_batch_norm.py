"""Ghost batch normalisation against torch's where there is one group, and against a written-out form in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import GhostBatchNorm2d, end_step, make_gate

SHAPE = (5, 6)  # rows, columns


def drawn(batch: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(batch, channels, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * values + torch.arange(channels).view(-1, 1, 1)).to(dtype)


def normalisation(channels: int, group: int, dtype: torch.dtype = torch.float64) -> GhostBatchNorm2d:
    layer = GhostBatchNorm2d(channels, group).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2.0, channels))
        layer.bias.copy_(torch.linspace(-1.0, 1.0, channels))
    return layer


def written_out(x: Tensor, group: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the means [C] over groups of their means and unbiased variances."""
    outputs, means, variances = [], [], []
    for first in range(0, len(x), group):
        part = x[first : first + group]
        values = part.transpose(0, 1).flatten(1)
        mean, variance = values.mean(1), values.var(1, correction=0)
        normal = (part - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + eps).sqrt()
        outputs.append(normal * weight.view(-1, 1, 1) + bias.view(-1, 1, 1))
        means.append(mean)
        variances.append(values.var(1))
    return torch.cat(outputs), torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_group_is_torchs_batch_normalisation(dtype: torch.dtype):
    ours = normalisation(4, group=8, dtype=dtype)
    theirs = nn.BatchNorm2d(4, eps=1e-3, momentum=0.01).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for seed in range(3):
        x = drawn(8, 4, seed, dtype)
        assert torch.equal(ours(x), theirs(x))
        end_step(ours, seed)
    faded = 0.99**3  # what torch keeps of its start, 0 and 1
    torch.testing.assert_close(ours.running_mean, theirs.running_mean / (1 - faded), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.running_var, (theirs.running_var - faded) / (1 - faded), rtol=1e-5, atol=1e-7)
    x = drawn(3, 4, 9, dtype)  # no multiple of the group
    theirs.running_mean, theirs.running_var = ours.running_mean.clone(), ours.running_var.clone()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_running_statistics_end_as_torchs():
    ours, theirs = normalisation(2, group=4), nn.BatchNorm2d(2, momentum=0.1).double()
    ours.momentum = 0.1
    for seed in range(200):
        x = drawn(4, 2, seed)
        ours(x), theirs(x)
        end_step(ours, seed)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize(("batch", "group"), [(4, 1), (6, 2), (6, 3), (8, 4), (8, 8)])
def test_groups_equal_a_written_out_form(batch: int, group: int):
    layer = normalisation(3, group)
    x, wanted = drawn(batch, 3).requires_grad_(), drawn(batch, 3, seed=1)
    (layer(x) * wanted).sum().backward()
    found = [x.grad, layer.weight.grad, layer.bias.grad]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, layer.weight, layer.bias)]
    output, mean, variance = written_out(leaves[0], group, leaves[1], leaves[2], layer.eps)
    torch.testing.assert_close(layer(x.detach()), output.detach(), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((output * wanted).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    end_step(layer, 0)
    torch.testing.assert_close(layer.running_mean, mean.detach(), rtol=1e-12, atol=1e-14)  # the first step's own
    torch.testing.assert_close(layer.running_var, variance.detach(), rtol=1e-12, atol=0.0)


def test_how_a_batch_is_cut_changes_nothing():
    whole, cut = normalisation(3, 2, torch.float32), normalisation(3, 2, torch.float32)
    x = drawn(12, 3, dtype=torch.float32)
    parts = [cut(part) for part in x.split([4, 2, 6])]
    assert torch.equal(whole(x), torch.cat(parts))
    for layer in (whole, cut):
        end_step(layer, 0)
    assert torch.equal(whole.running_mean, cut.running_mean)
    assert torch.equal(whole.running_var, cut.running_var)


def test_a_forward_that_is_recomputed_changes_no_buffer():
    once, twice = (nn.Sequential(nn.Conv2d(3, 3, 1), normalisation(3, 2)).double() for _ in range(2))
    twice.load_state_dict(once.state_dict())
    x = drawn(4, 3).requires_grad_()
    once(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=False).square().sum().backward()
    for model in (once, twice):
        end_step(model, 0)
    for one, other in zip(once.buffers(), twice.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0.0)


def test_a_step_without_a_forward_and_evaluation_leave_the_buffers():
    layer = normalisation(3, 2)
    layer.eval()(drawn(4, 3))
    end_step(layer, 0)
    assert torch.equal(layer.running_mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(layer.running_var, torch.ones(3, dtype=torch.float64))


def test_autocast_leaves_parameters_and_statistics_alone():
    layer = normalisation(3, 4, torch.float32)
    x = drawn(4, 3, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    end_step(layer, 0)
    assert y.dtype == torch.bfloat16
    statistics = [layer.running_mean, layer.running_var]
    assert {tensor.dtype for tensor in [*layer.parameters(), *statistics]} == {torch.float32}
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.running_mean, x.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-4)


def test_a_copy_starts_a_step_afresh():
    layer = normalisation(3, 2)
    layer(drawn(4, 3))
    other = copy.deepcopy(layer)
    end_step(other, 0)
    assert torch.equal(other.running_mean, torch.zeros(3, dtype=torch.float64))
    end_step(layer, 0)
    assert layer.running_mean.any()


def test_a_batch_that_is_not_whole_groups_is_refused():
    with pytest.raises(ConfigError, match="groups of 4 samples but was given 6"):
        normalisation(3, 4)(drawn(6, 3))
    with pytest.raises(ConfigError, match="group=0"):
        GhostBatchNorm2d(3, 0)


def test_a_gate_may_normalise_groups():
    sizes = {"in_channels": 2, "generator": torch.Generator().manual_seed(1)}
    plain = make_gate("coordconv_multi", 4, 1, SHAPE, **sizes)
    sizes["generator"] = torch.Generator().manual_seed(1)
    grouped = make_gate("coordconv_multi", 4, 1, SHAPE, ghost_batch=3, **sizes)
    x = drawn(3, 2, dtype=torch.float32)
    assert torch.equal(plain(x)[0], grouped(x)[0])
    twice = torch.cat([x, x + 1])
    assert torch.equal(grouped(twice)[0][:3], grouped(x)[0])
    assert not torch.equal(plain(twice)[0][:3], plain(x)[0])
