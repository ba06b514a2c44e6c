"""Sums from which scores are made, batch by batch and over any number of processes.

A score is the mean of some quantity over samples, then over places. Sums over samples are kept for each place in
float64: adding them over processes gives exactly the state of one process that saw all samples (up to the order of
addition), and any region or area weight can be applied at the end.

Dimensions: B batch, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.runs import Scores


class Accumulator(Protocol):
    """Sums that can be added up over processes, and the scores made of them."""

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies: add them up in place over processes, then ask for the result."""

    def result(self) -> Scores:
        """Scores of all that was added."""


def region_masks(region: np.ndarray | Tensor | None, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Which cells belong to each region: "all", and "region_0", "region_1", ... of a map of region numbers.

    Args:
        region: [H, W] integers from 0, or None for a domain that has no regions.
        grid: (H, W).

    Returns:
        {name: [H, W] float64 of 0 and 1}.

    Raises:
        DataError: a map of another grid.
    """
    masks = {"all": torch.ones(grid, dtype=torch.float64)}
    if region is None:
        return masks
    numbers = torch.as_tensor(np.asarray(region)).long()
    if tuple(numbers.shape) != tuple(grid):
        raise DataError(f"region map has shape {tuple(numbers.shape)} but the grid is {tuple(grid)}; give a map of the grid")
    for r in range(int(numbers.max()) + 1):
        masks[f"region_{r}"] = (numbers == r).double()
    return masks


class PointSums:
    """Sum over samples of a quantity at each channel and cell.

    Args:
        channels: C.
        grid: (H, W).
    """

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        self.total = torch.zeros(channels, *grid, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor, valid: Tensor) -> None:
        """Add ``values`` [B, C, H, W] of the samples that are ``valid`` [B]; the others may hold anything."""
        if self.total.device != values.device:
            self.total, self.count = self.total.to(values.device), self.count.to(values.device)
        kept = torch.where(valid.view(-1, 1, 1, 1), values.double(), 0.0)
        self.total += kept.sum(dim=0)
        self.count += valid.sum()

    def mean(self, weight: Tensor, channel: int | None = None) -> float:
        """Mean over samples and cells, weighted by ``weight`` [H, W]; nan where nothing was added or nothing weighs.

        Args:
            weight: not negative, any scale.
            channel: only this one; None takes the mean of all.
        """
        at_cells = self.total.cpu().mean(dim=0) if channel is None else self.total[channel].cpu()
        norm = weight.sum() * self.count.cpu()
        return float((at_cells * weight).sum() / norm) if float(norm) > 0 else float("nan")


class PointScore:
    """An accumulator whose score is a mean over samples and cells; what is averaged is left to the subclass.

    Args:
        channels: C.
        grid: (H, W).
        name: of the score.
        regions: masks [H, W] by name (`region_masks`); None has "all" alone.
        weights: [H, W] of the cells; None weighs all alike.
        per_channel: names of the channels, to score each by itself as ``<name>_<channel>``; None scores them together.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        name: str,
        regions: Mapping[str, Tensor] | None = None,
        weights: np.ndarray | Tensor | None = None,
        per_channel: list[str] | None = None,
    ) -> None:
        self.name = name
        self.regions = dict(regions) if regions is not None else region_masks(None, grid)
        self.weights = torch.ones(grid) if weights is None else torch.as_tensor(np.asarray(weights))
        if tuple(self.weights.shape) != tuple(grid):
            raise DataError(f"weights of {name} have shape {tuple(self.weights.shape)} but the grid is {tuple(grid)}")
        self.weights = self.weights.double()
        self.per_channel = per_channel
        self.sums = PointSums(channels, grid)

    def quantity(self, output: Tensor, target: Tensor) -> Tensor:
        """What is averaged: [B, C, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it averages")

    def finish(self, mean: float) -> float:
        """From the mean to the score."""
        return mean

    def update(self, output: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch: fields [B, C, H, W], and which samples count [B] bool.

        Raises:
            DataError: output and target of different shape (broadcasting would score the wrong thing).
        """
        if output.shape != target.shape:
            raise DataError(
                f"{self.name}: output {tuple(output.shape)} and target {tuple(target.shape)} differ; the model's last "
                "layer must have as many channels as there are targets"
            )
        with torch.no_grad():
            self.sums.add(self.quantity(output, target), valid)

    def state(self) -> dict[str, Tensor]:
        """The sums themselves."""
        return {"total": self.sums.total, "count": self.sums.count}

    def result(self) -> Scores:
        """{region: {score: value}}."""
        names: dict[str, int | None] = {self.name: None}
        if self.per_channel is not None:
            names = {f"{self.name}_{channel}": c for c, channel in enumerate(self.per_channel)}
        return {
            region: {name: self.finish(self.sums.mean(self.weights * mask, c)) for name, c in names.items()}
            for region, mask in self.regions.items()
        }
