"""What attach_routing_loss refuses, since its kernels would read beyond it or classify other pixels; and what it takes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import RoutingLossRules, attach_routing_loss, reference

B, N, K, F, H, W = 3, 5, 2, 2, 4, 6
RULES = RoutingLossRules(0.4, damping_quantile=0.4)


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def numbers(*shape: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    return zeros(*shape, dtype=dtype, device=device)


def given(**change: Any) -> dict[str, Any]:
    """Arguments that go together, but for what is changed."""
    good = {
        "y": zeros(B, K * F, H, W),
        "values": zeros(N, H, W),
        "indices": torch.rand(N, H, W).argsort(0)[:K],
        "filters": F,
        "before_weighting": zeros(B, K * F, H, W),
        "error_divisor": zeros(H, W),
    }
    return {**good, "rules": RULES, **change}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"y": zeros(K * F, H, W)}, r"output \[4, 4, 6\], .* give \[B, K F, H, W\]"),
    ({"indices": numbers(H, W)}, r"indices \[4, 6\], filters=2: give .*\[K, H, W\] or \[B, K, H, W\]"),
    ({"filters": 0}, "filters=0: give .* at least 1"),
    ({"filters": 1}, r"output \[3, 4, 4, 6\] is not of indices \[2, 4, 6\] with filters=1: give the indices that made it"),
    ({"indices": numbers(K + 1, H, W)}, r"is not of indices \[3, 4, 6\]"),
    ({"indices": numbers(K, W, H)}, r"is not of indices \[2, 6, 4\]"),
    ({"indices": numbers(B - 1, K, H, W)}, r"is not of indices \[2, 2, 4, 6\]"),
    ({"indices": zeros(K, H, W)}, "indices are torch.float64; give torch.int64 or torch.int32"),
    ({"before_weighting": zeros(B, K, H, W)}, r"before_weighting \[3, 2, 4, 6\]: give the shape of the output, \[3, 4, 4, 6\]"),
    ({"error_divisor": zeros(1)}, r"error_divisor \[1\]: give one number a pixel, \[4, 6\]"),
    ({"error_divisor": zeros(W, H)}, r"error_divisor \[6, 4\]"),
    ({"values": zeros(N, H, W - 1)}, r"values \[5, 4, 5\] do not fit indices \[2, 4, 6\]: give \[N, 4, 6\] or \[3, N, 4, 6\]"),
    ({"values": zeros(1, H, W)}, "N above 2, or None to learn nothing"),
    ({"values": zeros(K, H, W)}, "N above 2, or None to learn nothing"),  # labels are shared out among N - K experts
    ({"values": zeros(H, W)}, r"values \[4, 6\] do not fit"),
    ({"values": zeros(B + 1, N, H, W)}, r"values \[4, 5, 4, 6\] do not fit"),
    ({"values": zeros(N, H, W, device="meta")}, "output is on cpu, values on meta; move them to one device"),
    ({"indices": numbers(K, H, W, device="meta")}, "indices on meta"),
    ({"before_weighting": zeros(B, K * F, H, W, device="meta")}, "before_weighting on meta"),
    ({"error_divisor": zeros(H, W, device="meta")}, "error_divisor on meta"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str):
    attach_routing_loss(**given())
    with pytest.raises(ConfigError, match=message):
        attach_routing_loss(**given(**change))


@pytest.mark.parametrize("batched", [False, True])
def test_what_the_values_do_not_fit_after_collecting_is_refused(batched: bool):
    half = zeros(*([B] if batched else []), N, H, W // 2).requires_grad_()

    def gradient(collect) -> Tensor:
        out, _ = attach_routing_loss(**given(values=half, collect=collect, y=zeros(B, K * F, H, W).requires_grad_()))
        return torch.autograd.grad(out.sum(), half)[0]

    def west(t: Tensor) -> Tensor:
        return t[..., : W // 2]

    assert gradient(lambda counts, indices, batch: (west(counts), west(indices), batch)).shape == half.shape
    with pytest.raises(ConfigError, match=r"do not fit indices \[2, 4, 6\]"):
        gradient(lambda counts, indices, batch: (west(counts), indices, batch))
    with pytest.raises(ConfigError, match=r"collect returned counts \[.*2, 4, 6\], .*: give counts \[.*2, 4, 3\]"):
        gradient(lambda counts, indices, batch: (counts, west(indices), batch))
    if batched:
        with pytest.raises(ConfigError, match=r"values \[3, 5, 4, 3\] do not fit .* or \[4, N, 4, 3\]"):
            gradient(lambda counts, indices, batch: (west(counts), west(indices), batch + 1))


@pytest.mark.parametrize("shared_values", [False, True])
def test_one_choice_with_a_batch_dimension_serves_all_samples(shared_values: bool):
    generator = torch.Generator().manual_seed(0)
    shape = (N, H, W) if shared_values else (B, N, H, W)
    values = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    g = torch.randn(B, K, H, W, dtype=torch.float64, generator=generator)
    one = torch.rand(1, N, H, W, generator=generator).argsort(1)[:, :K]
    out, _ = attach_routing_loss(torch.zeros_like(g).requires_grad_(), values, one, RoutingLossRules(0.4))
    (ours,) = torch.autograd.grad((out * g).sum(), values)
    correct = reference.correct_selections(g, quantile=0.4, tolerance=1e-5)
    loss = reference.routing_loss(values, reference.labels_of(correct, one.expand(B, -1, -1, -1), N))
    torch.testing.assert_close(ours, torch.autograd.grad(loss, values)[0])
