"""Auxiliary losses on a gate's values: importance, load and spatial agreement, as the published code defines them.

Each is ordinary autograd on the values [B, N, H, W]; values without a batch dimension count as one sample.

Dimensions: B batch, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Weights of the auxiliary losses; 0 leaves one out.

    Args:
        importance: squared coefficient of variation, over experts, of the sum of an expert's values.
        load: the same, over experts and pixels, of the expected number of selections if the noise were drawn again;
            needs gate noise.
        spatial_agreement: sum over experts of the mean over pixels of the standard deviation over the batch.
    """

    importance: float = 0.0
    load: float = 0.0
    spatial_agreement: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"auxiliary loss {name}={weight}: give a weight of at least 0")

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def of(self, raw: Tensor, noisy: Tensor, normalised: Tensor, selected: int, noise_std: float) -> Tensor:
        """The weighted sum, 0-d, for values [(B,) N, H, W]: raw, after the noise, and normalised if the gate's are."""
        total = raw.new_zeros(())
        if self.importance:
            total = total + self.importance * importance_loss(normalised)
        if self.load:
            total = total + self.load * load_loss(raw, noisy, selected, noise_std)
        if self.spatial_agreement:
            total = total + self.spatial_agreement * spatial_agreement_loss(raw)
        return total


def _variation(amounts: Tensor) -> Tensor:
    """Squared coefficient of variation of all entries; 0-d."""
    return (amounts.std() / amounts.mean()) ** 2


def importance_loss(values: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' summed values; 0-d. ``values``: [(B,) N, H, W]."""
    per_expert = values.movedim(-3, 0).flatten(1).sum(1)
    return _variation(per_expert)


def load_loss(values: Tensor, noisy: Tensor, selected: int, noise_std: float) -> Tensor:
    """Squared coefficient of variation of how often each expert is expected to be selected at each pixel; 0-d.

    Args:
        values: [(B,) N, H, W] before the noise.
        noisy: the same after it.
        selected: K.
        noise_std: of the noise.
    """
    least = noisy.topk(selected, dim=-3).values[..., -1:, :, :]
    chance = 0.5 * torch.special.erfc((least - values) / (noise_std * math.sqrt(2.0)))
    return _variation(chance if chance.dim() == 3 else chance.sum(0))


def spatial_agreement_loss(values: Tensor) -> Tensor:
    """Sum over experts of the mean over pixels of the standard deviation over the batch; 0-d.

    Zero for values [N, H, W] that all samples share, and for a batch of one.
    """
    if values.dim() == 3 or values.shape[0] < 2:
        return values.new_zeros(())
    return values.std(0).mean((-2, -1)).sum()
