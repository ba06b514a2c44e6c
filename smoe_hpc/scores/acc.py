"""Anomaly correlation: how alike two fields differ from what is usual."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.runs import Scores


class AnomalyCorrelation:
    """Mean over samples of the correlation over places of forecast and true anomalies, as WeatherBench 2 has it.

    For each sample sum(w f' t') / sqrt(sum(w f'^2) sum(w t'^2)) with f' and t' the differences from the climatology and w
    the cells' weights; 1 is perfect, 0 no better than the climatology.

    Args:
        channels: names of the C channels, each scored by itself as ``<name>_<channel>``.
        weights: [H, W] of the cells.
        name: of the score.
    """

    def __init__(self, channels: list[str], weights: np.ndarray | Tensor, name: str = "acc") -> None:
        self.name, self.channels = name, channels
        self.weights = torch.as_tensor(np.asarray(weights)).double()
        self.total = torch.zeros(len(channels), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def update(self, output: Tensor, target: Tensor, usual: Tensor, valid: Tensor) -> None:
        """Add a batch: forecast, truth and climatology [B, C, H, W] in the same units, and which samples count [B] bool.

        Raises:
            DataError: fields of different shape.
        """
        if not output.shape == target.shape == usual.shape:
            raise DataError(
                f"{self.name}: output {tuple(output.shape)}, target {tuple(target.shape)} and climatology "
                f"{tuple(usual.shape)} differ; they must be of the same channels and grid"
            )
        if self.total.device != output.device:
            self.total, self.count = self.total.to(output.device), self.count.to(output.device)
        if self.weights.device != output.device:
            self.weights = self.weights.to(output.device)
        with torch.no_grad():
            ours, theirs = (fields.double() - usual.double() for fields in (output, target))
            both = (self.weights * ours * theirs).sum((2, 3))
            sizes = (self.weights * ours.square()).sum((2, 3)) * (self.weights * theirs.square()).sum((2, 3))
            # A field without any anomaly correlates with nothing.
            correlation = torch.where(sizes > 0, both / sizes.clamp(min=torch.finfo(torch.float64).tiny).sqrt(), 0.0)
            self.total += torch.where(valid[:, None], correlation, 0.0).sum(0)
            self.count += valid.sum()

    def state(self) -> dict[str, Tensor]:
        """The sums themselves."""
        return {"total": self.total, "count": self.count}

    def result(self) -> Scores:
        """{"all": {score: value}}."""
        means = (self.total / self.count).cpu().tolist()
        return {"all": {f"{self.name}_{channel}": mean for channel, mean in zip(self.channels, means, strict=True)}}
