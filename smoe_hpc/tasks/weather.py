"""Medium-range weather as Rasp and Thuerey (2021) and the paper (section 4.2) set it up.

Inputs are all channels at a few past hours and constant fields; targets a few channels some days ahead: of one lead, of
several at once ("direct"), or of one that an input channel gives to the model ("continuous"). Precipitation, which is
stored as a logarithm that is 0 where it is dry, is only divided by its standard deviation, so that dry stays 0.

Dimensions: B batch, L leads, Ct targets, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.config import Recipe
from smoe_hpc.config.making import require_data
from smoe_hpc.errors import ConfigError, DataError
from smoe_hpc.io.communicator import SINGLE_PROCESS, Communicator
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.coordinates import SECONDS_PER_HOUR
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import Statistics, statistics_of
from smoe_hpc.io.statistics.climatology import Climatology, climatology_of, week_of
from smoe_hpc.io.store import transforms
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.progress import Progress
from smoe_hpc.runs import Selection
from smoe_hpc.scores import Accumulator, AnomalyCorrelation, Mse, Rmse
from smoe_hpc.tasks.base import Feed, Scoreboard
from smoe_hpc.tasks.regional import RegionalTask


class WeatherTask(RegionalTask):
    """Global fields, days ahead; mean squared error of normalised fields, weighted by the cosine of latitude.

    Scores of each target and lead, such as ``rmse_z500_72h``, in the target's unit and weighted likewise; the root is taken
    after the mean over time and space. Beside ``rmse`` of the model stand ``persistence_rmse`` (the newest input as the
    forecast, where targets are inputs), ``climatology_rmse`` and ``weekly_climatology_rmse`` (means of the training split,
    of all times and of the week of the year), and ``acc``, the anomaly correlation against the weekly climatology; and
    ``loss``.

    Args:
        recipe: with ``data.store`` a store of times, a folder or a pattern of them, on a grid round the Earth.

    Raises:
        DataError: data that are missing or damaged, of a region only, with missing times where ``data.gaps`` refuses
            them, or large and not yet prepared (`prepare_data`).
    """

    def prepare(self) -> None:
        """Open the store, take statistics and climatology of the training split from the cache."""
        super().prepare()
        if not self.store.grid.periodic:
            raise DataError(
                f"{self.store.path} covers {self.store.grid.describe()}, but weather is of the whole Earth; for a region "
                "set task=regional"
            )
        self.climatology: Climatology | None
        if self.learned is None:
            self.climatology = climatology_of(self.store, self.training_split, self.targets)
        else:
            self.climatology = self.learned.climatology
        self._usual: tuple[Tensor, Tensor] | None = None

    def take_statistics(self) -> Statistics:
        """From the cache; the mean of a channel that is stored as a logarithm is left at 0."""
        found = statistics_of(self.store, self.training_split, self.read_channels)
        logarithms = [kind != transforms.NONE for kind in found.transforms]
        return replace(found, mean=tuple(0.0 if log else m for m, log in zip(found.mean, logarithms, strict=True)))

    @property
    def selection(self) -> Selection:
        """Smallest validation loss."""
        return Selection("validation", "all", "loss", "min")

    def window(self, split: str) -> Window:
        """Fields of a sample: in training of a continuous model a lead is drawn, elsewhere it is scored at each."""
        data = self.recipe.data
        inputs, leads = tuple(data.inputs), tuple(data.all_leads)
        if data.lead_mode == "direct":
            return Window(inputs, leads)
        if split == "train":
            return Window(inputs, leads, "drawn")
        return Window(inputs, tuple(data.validation_leads or leads), "each")

    def open_samples(self, split: str) -> Samples:
        """Samples whose inputs and targets all lie inside the split."""
        data = self.recipe.data
        return Samples(
            self.store,
            self.window(split),
            self.days(split),
            self.inputs,
            self.targets,
            self.statistics,
            constants=data.constants,
            order=self.order,
            gaps=data.gaps,
        )

    def score(self, split: str) -> Scoreboard:
        """Scores of a split, of the model and of what it must beat."""
        samples, weights = self.samples(split), self.grid.cos_latitude_weights()
        loss = Mse(samples.out_channels, self.grid.shape, name="loss", weights=weights)
        parts: dict[str, tuple[Accumulator, Feed]] = {
            "loss": (loss, lambda output, batch, valid: loss.update(output, batch.targets, valid))
        }
        for number, lead in enumerate(samples.window.leads):
            parts |= self._parts_of_lead(samples, number, lead, weights)
        return Scoreboard(parts)

    def _parts_of_lead(
        self, samples: Samples, number: int, lead: int, weights: np.ndarray
    ) -> dict[str, tuple[Accumulator, Feed]]:
        """Accumulators of one lead, and what feeds them."""
        count, grid, by_lead = len(self.targets), self.grid.shape, samples.window.by_lead
        names = [f"{target}_{lead}h" for target in self.targets]
        mine = slice(None) if by_lead else slice(number * count, (number + 1) * count)  # channels, leads one after another
        newest = samples.newest
        weeks = _weeks_at(samples, lead)

        def truth(batch: Batch) -> Tensor:
            return self.in_units(batch.targets[:, mine])

        def weekly(batch: Batch) -> Tensor:
            start = batch.ids.clamp(min=0) // (len(samples.window.leads) if by_lead else 1)
            return self._usual_on(batch)[1][weeks.to(start.device)[start]]

        forecasts: dict[str, Callable[[Tensor, Batch], Tensor]] = {
            "rmse": lambda output, batch: self.in_units(output[:, mine]),
        }
        if self.climatology is not None:
            forecasts["climatology_rmse"] = lambda output, batch: self._usual_on(batch)[0].expand(len(output), -1, -1, -1)
            forecasts["weekly_climatology_rmse"] = lambda output, batch: weekly(batch)
        if newest is not None:
            forecasts["persistence_rmse"] = lambda output, batch: self.in_units(batch.inputs[:, newest[:count]])
        parts: dict[str, tuple[Accumulator, Feed]] = {}
        for name, forecast in forecasts.items():
            rmse = Rmse(count, grid, name=name, weights=weights, per_channel=names)
            parts[f"{name}_{lead}h"] = (rmse, _feed(rmse, forecast, truth, lead if by_lead else None))
        if self.climatology is None:
            return parts
        acc = AnomalyCorrelation(names, weights)

        def correlate(output: Tensor, batch: Batch, valid: Tensor) -> None:
            counted = _of_lead(batch, valid, lead if by_lead else None)
            acc.update(self.in_units(output[:, mine]), truth(batch), weekly(batch), counted)

        parts[f"acc_{lead}h"] = (acc, correlate)
        return parts

    def _usual_on(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Climatology [Ct, H, W] and its weeks [52, Ct, H, W], float64, where the batch is."""
        assert self.climatology is not None
        device = batch.targets.device
        if self._usual is None or self._usual[0].device != device:
            parts = (torch.from_numpy(part).to(device) for part in (self.climatology.mean, self.climatology.weekly))
            self._usual = (next(parts), next(parts))
        return self._usual

    def in_units(self, fields: Tensor) -> Tensor:
        """Targets or forecasts of one lead [B, Ct, H, W] back in their physical units, float64."""
        count = len(self.targets)
        samples = self.samples("train")
        mean, std = (part[:count].to(fields.device, torch.float64) for part in (samples.target_mean, samples.target_std))
        values = fields[:, :count].double() * std + mean
        for channel, index in enumerate(self.store.channel_indices(self.targets)):
            amount = transforms.threshold(self.store.transforms[index])
            if amount is not None:
                values[:, channel] = amount * torch.expm1(values[:, channel])
        return values


def _of_lead(batch: Batch, valid: Tensor, lead: int | None) -> Tensor:
    """[B] bool: samples that count for a lead; None where all samples have all leads."""
    if lead is None:
        return valid
    assert batch.leads is not None
    return valid & (batch.leads == lead)


def _feed(rmse: Rmse, forecast: Callable[[Tensor, Batch], Tensor], truth: Callable[[Batch], Tensor], lead: int | None) -> Feed:
    return lambda output, batch, valid: rmse.update(forecast(output, batch), truth(batch), _of_lead(batch, valid, lead))


def _weeks_at(samples: Samples, lead: int) -> Tensor:
    """[S] int64: week of the year in which the target of each start lies."""
    newest = samples.input_rows[:, -1]
    after = (lead - samples.window.inputs[-1]) * SECONDS_PER_HOUR
    return torch.from_numpy(week_of(samples.store.coords["time"][newest] + np.timedelta64(after, "s")))


def prepare_data(
    recipe: Recipe, communicator: Communicator = SINGLE_PROCESS, progress: Progress | None = None
) -> tuple[Statistics, Climatology]:
    """Compute and keep what training takes from the cache: statistics and climatology. Collective over the communicator.

    Args:
        recipe: of a weather task.
        communicator: who shares the work.
        progress: called with (fields done, fields in all) of this rank, while it takes statistics.

    Raises:
        ConfigError: a task that has nothing to prepare.
        DataError: data that are missing or damaged.
    """
    if recipe.task != "weather":
        raise ConfigError(
            f"task={recipe.task} takes its statistics when it starts, there is nothing to prepare; only weather recipes "
            "have it done before"
        )
    require_data(recipe)
    store, split = open_store(recipe.data.store), Split(recipe.data.splits["train"])
    inputs = recipe.data.variables or store.channels
    targets = recipe.data.targets or inputs
    names = list(dict.fromkeys([*inputs, *targets]))
    return (
        statistics_of(store, split, names, communicator, compute="always", progress=progress),
        climatology_of(store, split, targets, communicator, compute="always"),
    )
