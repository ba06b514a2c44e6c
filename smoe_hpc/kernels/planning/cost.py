"""What the ways to run an expert convolution on a GPU cost, and which is chosen for a layer's sizes.

*Tiled* kernels compute, for every tile of pixels, the experts that any of them selects; *dense* is the library's convolution
with all experts and a gather. The choice follows from sizes and type alone, never from a routing or a clock: it is the same
on every rank and in every run, and nothing is read back from the device. A smooth routing is assumed: a tile of p pixels
lists about ``K (1 + a log2 p (1 + log2(N / K)))`` experts, and never more than N. Where it is random, tiles list more.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smoe_hpc.kernels.planning.geometry import MOST_EXPERTS


@dataclass(frozen=True)
class Rates:
    """Speed of a device. Those below are of an H200: ``tiled`` and ``bandwidth`` of 16-bit types are fitted to ``smoe-hpc bench
    layer`` (docs/benchmarks.md) and give its times of both passes to 25 % where routing is smooth; ``dense`` is that of a
    plain convolution there; the starts and float32 are set by hand.

    Args:
        tiled, dense: multiply-adds a second of columns computed, in units of 1e12: forward and both gradients together.
        tiled_start, dense_start: seconds that forward and backward take however small the layer.
        bandwidth: bytes a second, for the gather of the dense form.
    """

    tiled: float
    dense: float
    tiled_start: float
    dense_start: float
    bandwidth: float


_RATES = {
    torch.bfloat16: Rates(220.0, 330.0, 50e-6, 60e-6, 0.8e12),
    torch.float16: Rates(220.0, 330.0, 50e-6, 60e-6, 0.8e12),
    torch.float32: Rates(11.0, 11.0, 900e-6, 60e-6, 1.2e12),  # dense would be twice as fast, but is not exact to 1e-6
}
_QUICK_TAPS = (1, 9)  # kernels of 1x1 and 3x3, which Hopper's own instructions do
_GROWTH = 0.055  # a: of a tile's list, see above; 16 pixels list 1.33, 1.78 and 2.14 K experts of 2, 8 and 32 K


def columns_of_tile(num_experts: int, selected: int, pixels: int) -> float:
    """Experts that a tile of so many pixels lists where neighbours select alike."""
    if num_experts <= selected:
        return float(num_experts)
    spread = math.log2(num_experts / selected)
    return min(float(num_experts), selected * (1.0 + _GROWTH * math.log2(max(pixels, 1)) * (1.0 + spread)))


@functools.lru_cache(maxsize=1024)
def prefers_tiles(
    dtype: torch.dtype, samples: int, pixels: int, channels: int, num_experts: int, selected: int, filters: int, taps: int
) -> bool:
    """Whether the tiled kernels are expected to be faster than the dense form, forward and backward together.

    Args:
        dtype: of the input; one that the kernels have.
        samples, pixels: B and H W.
        channels, num_experts, selected, filters, taps: C, N, K, F and k k.
    """
    if num_experts == selected:
        return False
    rates = _RATES[dtype]
    work = 3.0 * samples * pixels * channels * taps
    dense_columns, kept = num_experts * filters, selected * filters
    padded = -(-channels // 64) * 64 / channels  # tiles take channels 64 at a time and columns 16 at a time
    listed = max(16.0, columns_of_tile(num_experts, selected, 16) * filters)
    speed = rates.tiled if taps in _QUICK_TAPS else rates.tiled / 3.0
    tiled = rates.tiled_start + work * padded * listed / (speed * 1e12)
    moved = 3.0 * samples * pixels * (dense_columns + kept) * dtype.itemsize
    dense = rates.dense_start + work * dense_columns / (rates.dense * 1e12) + moved / rates.bandwidth
    return tiled < dense


def suits_tiles(dtype: torch.dtype, batch: int, weight_shape: Sequence[int], indices_shape: Sequence[int]) -> bool:
    """Whether the tiled kernels are to run this: a type that they have, sizes at which they are the faster form.

    Args:
        dtype: of the input.
        batch: B.
        weight_shape: N, F, C, k, k.
        indices_shape: [B,] K, H, W.
    """
    experts, filters, channels, size, _ = weight_shape
    selected, height, width = indices_shape[-3:]
    if dtype not in _RATES or experts > MOST_EXPERTS or not min(batch, *weight_shape, *indices_shape):
        return False
    prefers = prefers_tiles.__wrapped__ if torch.compiler.is_compiling() else prefers_tiles  # compilers see through no cache
    return prefers(dtype, batch, height * width, channels, experts, selected, filters, size**2)
