"""What tasks have in common: a model from the recipe, samples by split, scores fed from batches.

Dimensions: B batch, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from smoe_hpc.config import Recipe
from smoe_hpc.errors import ConfigError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.order import Order
from smoe_hpc.io.pipeline import Batch, Samples
from smoe_hpc.models import build_model
from smoe_hpc.scores import Accumulator, Results

Feed = Callable[[Tensor, Batch, Tensor], None]
"""Adds a batch to one accumulator: (output [B, C, H, W], batch, valid [B] bool)."""


@dataclass(frozen=True)
class Selection:
    """The score that drives the schedule and picks the best checkpoint."""

    split: str
    region: str
    score: str
    mode: Literal["min", "max"]


class Scoreboard:
    """Several accumulators, each fed in its own way from the same batches.

    Args:
        parts: by name, an accumulator and what feeds it.
    """

    def __init__(self, parts: Mapping[str, tuple[Accumulator, Feed]]) -> None:
        self.parts = dict(parts)

    def update(self, output: Tensor, batch: Batch, valid: Tensor) -> None:
        """Add a batch; ``valid`` [B] is False for samples that only fill it up."""
        with torch.no_grad():
            for _, feed in self.parts.values():
                feed(output, batch, valid)

    def state(self) -> dict[str, Tensor]:
        """All float64 sums, by reference: adding them up in place over processes makes `result` that of all."""
        states = ((name, part.state()) for name, (part, _) in self.parts.items())
        return {f"{name}.{key}": value for name, state in states for key, value in state.items()}

    def result(self) -> Results:
        """{region: {score: value}} of all accumulators."""
        merged: Results = {}
        for part, _ in self.parts.values():
            for region, scores in part.result().items():
                merged.setdefault(region, {}).update(scores)
        return merged


class StoreTask(ABC):
    """A task whose samples come from stores.

    Args:
        recipe: the experiment.

    Raises:
        DataError: data that is missing or damaged.
        ConfigError: a model whose outputs are not as many as the targets.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model: nn.Module | None = None
        self._samples: dict[str, Samples] = {}
        self.prepare()
        samples = self.samples("train")
        outputs = recipe.model.channels[-1]
        if recipe.model.network == "stack" and outputs != samples.out_channels:
            raise ConfigError(
                f"model.channels ends with {outputs} outputs but there are {samples.out_channels} targets "
                f"({', '.join(samples.target_names)}); end it with {samples.out_channels}"
            )

    def prepare(self) -> None:
        """Open what all splits share, before the first samples are asked for; nothing unless a task says so."""
        return

    @property
    @abstractmethod
    def selection(self) -> Selection:
        """The score that picks the best model."""

    @abstractmethod
    def open_samples(self, split: str) -> Samples:
        """Samples of a split, opened anew."""

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch, 0-d."""

    @abstractmethod
    def score(self, split: str) -> Scoreboard:
        """A new scorer for a split."""

    def samples(self, split: str) -> Samples:
        """Samples of a split, opened once.

        Raises:
            DataError: no such split, or data that is missing or damaged.
        """
        if split not in self._samples:
            self._samples[split] = self.open_samples(split)
            self.grid.require_same(self._samples[split].grid, f"the {split} data")
        return self._samples[split]

    @property
    def order(self) -> Order:
        """How training mixes its samples."""
        return Order(self.recipe.data.order, self.recipe.data.block)

    @property
    def grid(self) -> Grid:
        """Points of inputs and targets."""
        return self.samples("train").grid

    def region_map(self) -> Tensor | None:
        """[H, W] true regions where the data knows them."""
        return None

    def newest(self) -> list[int] | None:
        """Input channels that hold the newest frame of each target; None where an input lacks a target."""
        return self.samples("train").newest

    def build_model(self) -> nn.Module:
        """A new model, the same on every process; the last one made is what routing scores look at.

        Raises:
            ConfigError: a model that these data cannot have.
        """
        samples = self.samples("train")
        newest = self.newest()
        sizes = (samples.in_channels, samples.out_channels, self.grid.shape)
        self.model = build_model(self.recipe, *sizes, self.region_map(), newest=[] if newest is None else newest)
        return self.model

    def pictures(self, run_dir: Path, model: nn.Module) -> None:
        """Draw the run's pictures into ``run_dir/pictures``."""
        # Drawing stands above tasks and takes matplotlib, so it is imported only where a run wants pictures.
        from smoe_hpc.report.pictures import draw_pictures

        draw_pictures(self, run_dir, model)
