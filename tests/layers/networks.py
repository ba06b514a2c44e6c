"""Two layers with something between them, in float64, and a loss for them."""

import torch
from torch import Tensor, nn

from smoe_hpc.layers import Damping, LatentGate, SpatialMoE2d

GRID = (4, 6)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def network(shared: bool = False, **options) -> nn.Sequential:
    common = LatentGate(5, 2, GRID, generator=seeded(2)) if shared else "latent"
    options = {"damping": Damping(0.1), "generator": seeded(1), "gate": common, **options}
    return nn.Sequential(SpatialMoE2d(2, 5, 2, GRID, **options), nn.Tanh(), SpatialMoE2d(2, 5, 2, GRID, **options)).double()


def task(y: Tensor, seed: int = 1) -> Tensor:
    return (y - normal(*y.shape, seed=seed)).square().mean()
