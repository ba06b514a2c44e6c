"""Any gate by name.

Dimensions: N experts, K selected, C input channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.gates.fixed import FixedGate, check_region_map
from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.gates.input_gates import (
    ConvGate,
    CoordConvGate,
    CoordConvMultiGate,
    InputGate,
    LinearGate,
    LocallyConnectedGate,
)
from smoe_hpc.layers.gates.latent import LatentGate

GATES: dict[str, type[Gate]] = {
    "latent": LatentGate,
    "conv": ConvGate,
    "coordconv": CoordConvGate,
    "coordconv_multi": CoordConvMultiGate,
    "lcn": LocallyConnectedGate,
    "linear": LinearGate,
    "fixed": FixedGate,
}


def make_gate(
    kind: str,
    num_experts: int,
    selected: int,
    grid: tuple[int, int],
    *,
    in_channels: int | None = None,
    kernel_size: int = 3,
    padding: str = "zeros",
    region_map: Tensor | None = None,
    ghost_batch: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Gate:
    """A gate by name; arguments that the kind does not use are ignored.

    Args:
        kind: "latent", "conv", "coordconv", "coordconv_multi", "lcn", "linear" or "fixed" (hyphens work too).
        num_experts, selected, grid: N, K, (H, W).
        in_channels: C of the layer's input; needed by gates that read it.
        kernel_size, padding: of the gate's convolutions.
        region_map: [H, W]; the choice itself for "fixed", one more input channel for gates that read the input.
        ghost_batch: samples that "coordconv_multi" normalises together; see :class:`InputGate`.
        generator: of the start values.
        options: softmax, absolute, noise, noise_seed, auxiliary; see :class:`smoe_hpc.layers.Gate`.

    Raises:
        ConfigError: an unknown kind or impossible sizes.
    """
    name = kind.replace("-", "_")
    if name not in GATES:
        raise ConfigError(f"gate={kind!r} is not known; choose one of {', '.join(GATES)}")
    if name == "latent":
        if region_map is not None:
            raise ConfigError("a latent gate has no input that a region map could join; drop it or choose another gate")
        return LatentGate(num_experts, selected, grid, generator=generator, **options)
    if name == "fixed":
        map_ = check_region_map(region_map, grid)
        return FixedGate(num_experts, selected, grid, region_map=map_, **options)
    if in_channels is None:
        raise ConfigError(f"gate={kind!r} reads the layer's input; give in_channels")
    input_gate = GATES[name]
    assert issubclass(input_gate, InputGate)
    return input_gate(
        num_experts,
        selected,
        grid,
        in_channels=in_channels,
        kernel_size=kernel_size,
        padding=padding,
        region_map=region_map,
        ghost_batch=ghost_batch,
        generator=generator,
        **options,
    )
