"""Gaussian gate noise from a counter: a pure function of (seed, step, sample), equal on all ranks and when recomputed.

Dimensions: B batch, N experts, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

NOISES = ("none", "shared", "per_sample")


def counter_normal(shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal numbers [*shape], float32 on the CPU, that depend on nothing but ``key``."""
    digest = hashlib.blake2b(b",".join(str(part).encode() for part in key), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def gate_noise(shape: tuple[int, int, int], kind: str, seed: int, step: int, samples: Tensor | None) -> Tensor:
    """Standard normal noise: "shared" [N, H, W] for the whole batch, "per_sample" [B, N, H, W].

    Args:
        shape: (N, H, W).
        kind: "shared" or "per_sample".
        seed: of the gate.
        step: of the training.
        samples: [B] int64, position of each sample in the step's global batch; needed for "per_sample".
    """
    if kind == "shared":
        return counter_normal(shape, seed, step)
    assert samples is not None
    return torch.stack([counter_normal(shape, seed, step, int(sample)) for sample in samples.tolist()])
