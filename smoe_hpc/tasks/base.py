"""What tasks have in common: a model from the recipe, samples by split, scores fed from batches.

Dimensions: B batch, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_hpc import __version__
from smoe_hpc.config import Recipe, to_yaml
from smoe_hpc.errors import ConfigError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.order import Order
from smoe_hpc.io.sampling.windows import Split
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.statistics.climatology import Climatology
from smoe_hpc.io.store.layout import is_synthetic
from smoe_hpc.models import build_model
from smoe_hpc.runs import Scores, Selection
from smoe_hpc.runs.description import ChannelScaling, Description
from smoe_hpc.scores import Accumulator

Feed = Callable[[Tensor, Batch, Tensor], None]
"""Adds a batch to one accumulator: (output [B, C, H, W], batch, valid [B] bool)."""


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

    def result(self) -> Scores:
        """{region: {score: value}} of all accumulators."""
        merged: Scores = {}
        for part, _ in self.parts.values():
            for region, scores in part.result().items():
                merged.setdefault(region, {}).update(scores)
        return merged


@dataclass(frozen=True)
class Learned:
    """What was taken from the training data, for a task on other data, which must not take it anew.

    Args:
        statistics: what normalises; None where nothing does.
        climatology: of the training split; None leaves out the scores that need it.
        days: what every split of the other data is.
    """

    statistics: Statistics | None
    climatology: Climatology | None
    days: Split


class StoreTask(ABC):
    """A task whose samples come from stores.

    Args:
        recipe: the experiment.
        learned: what is known already; None takes it from the training split.

    Raises:
        DataError: data that is missing or damaged.
        ConfigError: a model whose outputs are not as many as the targets.
    """

    def __init__(self, recipe: Recipe, learned: Learned | None = None) -> None:
        self.recipe, self.learned = recipe, learned
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
        """Open what all splits share, before the first samples; nothing unless a task overrides it."""
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

    def days(self, split: str) -> Split:
        """The part of the data that a split is, of data that go by days."""
        return Split(self.recipe.data.splits[split]) if self.learned is None else self.learned.days

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

    def describe(self) -> tuple[Description, dict[str, Tensor]]:
        """What the model takes and gives, for `model.json`, and the fixed fields that it reads.

        Targets are those of evaluation that the model has outputs for.
        """
        samples, data, store = self.samples("train"), self.recipe.data, self.samples("train").store
        newest, region = self.newest(), self.region_map()
        fixed = {"constants": samples.constant_fields} if samples.constants else {}
        if region is not None:
            fixed["region_map"] = region
        about = Description(
            recipe=to_yaml(self.recipe),
            step=0,
            grid=self.grid,
            axis="time" if "time" in store.coords else "run",
            offsets=tuple(data.inputs),
            inputs=_scalings(samples, samples.input_channels),
            constants=samples.constants,
            leads=tuple(data.all_leads),
            lead_mode=data.lead_mode,
            targets=_scalings(samples, samples.target_channels),
            newest=None if newest is None else tuple(newest),
            synthetic=is_synthetic(store.attributes),
            version=__version__,
            files={},
        )
        return about, fixed


def _scalings(samples: Samples, names: list[str]) -> tuple[ChannelScaling, ...]:
    """Of the named channels, as samples normalise them."""
    store, statistics = samples.store, samples.statistics
    numbers = (
        {}
        if statistics is None
        else dict(zip(statistics.channels, zip(statistics.mean, statistics.std, strict=True), strict=True))
    )
    return tuple(
        ChannelScaling(name, store.units[place], store.transforms[place], *numbers.get(name, (0.0, 1.0)))
        for name, place in zip(names, store.channel_indices(names), strict=True)
    )
