"""Forecast of a field some hours ahead from a few past ones, on one store of times.

Training is on normalised fields (mean and standard deviation of the training split); scores are in the field's own
unit.

Dimensions: B batch, C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smoe_hpc.config.making import require_data
from smoe_hpc.errors import DataError
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import Statistics, compute_statistics
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.layers import spatial_layers
from smoe_hpc.runs import Selection
from smoe_hpc.scores import Accumulator, Mse, Rmse, area_weights
from smoe_hpc.tasks.base import Feed, Scoreboard, StoreTask


class RegionalTask(StoreTask):
    """Fields at the recipe's input hours -> targets ``data.lead`` hours ahead; latitude-weighted mean squared error.

    Scores: ``loss`` (of normalised fields, as trained), ``rmse`` (unit of the target, cosine weights), ``rmse_area``
    (the same with area weights) and beside them ``persistence_rmse``, the error of the newest input taken as the
    forecast, where the targets are among the inputs. Several targets are scored each by itself, as ``rmse_<target>``
    and so on.

    Args:
        recipe: with ``data.store`` a store file of times, or several.

    Raises:
        DataError: a store that is missing, damaged, of runs instead of times, or without a variable that the recipe names.
    """

    def prepare(self) -> None:
        """Open the store and take the training split's statistics."""
        data = self.recipe.data
        require_data(self.recipe)
        self.store = open_store(data.store)
        if "time" not in self.store.coords:
            raise DataError(
                f"{data.store} has no times but {', '.join(self.store.coords)}; heat data are for recipes that set task=heat"
            )
        self.inputs = data.variables or self.store.channels
        self.targets = data.targets or self.inputs
        self.statistics: Statistics | None = None
        if data.normalize:
            self.statistics = self.take_statistics() if self.learned is None else self.learned.statistics
        self._weights = torch.from_numpy(self.store.grid.cos_latitude_weights())

    def take_statistics(self) -> Statistics:
        """Statistics of the training split, which normalise inputs and targets."""
        return compute_statistics(self.store, self.training_split, self.read_channels)

    @property
    def read_channels(self) -> list[str]:
        """Channels that samples read, each once."""
        return list(dict.fromkeys([*self.inputs, *self.targets]))

    @property
    def training_split(self) -> Split:
        """What a model may know."""
        return Split(self.recipe.data.splits["train"])

    @property
    def selection(self) -> Selection:
        """Smallest validation RMSE; the loss where several targets have no common unit."""
        score = "rmse" if len(self.targets) == 1 else "loss"
        return Selection("validation", "all", score, "min")

    def open_samples(self, split: str) -> Samples:
        """Samples whose inputs and target all lie inside the split."""
        data = self.recipe.data
        window = Window(tuple(data.inputs), (data.lead,))
        chosen = (self.days(split), self.inputs, self.targets, self.statistics)
        return Samples(self.store, window, *chosen, order=self.order, gaps=data.gaps)

    def build_model(self) -> nn.Module:
        """See `StoreTask.build_model`; layers that scale their error by the loss's weight are given it."""
        model = super().build_model()
        for layer in spatial_layers(model):
            if layer.routing_loss is not None and layer.routing_loss.error_scale == "loss_weight":
                layer.set_loss_weight(self._weights)
        return model

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean of w (f - t)^2 of normalised fields, w the cosine of latitude over its mean."""
        if self._weights.device != output.device:
            self._weights = self._weights.to(output.device)
        weights = self._weights.to(batch.targets.dtype)
        return (weights * (output - batch.targets).square()).mean()

    def score(self, split: str) -> Scoreboard:
        """Scores of a split, model and persistence."""
        grid, channels = self.grid.shape, len(self.targets)
        names = None if channels == 1 else list(self.targets)
        cosine, area = self.grid.cos_latitude_weights(), area_weights(self.grid)
        loss = Mse(channels, grid, name="loss", weights=cosine)
        rmse = Rmse(channels, grid, name="rmse", weights=cosine, per_channel=names)
        by_area = Rmse(channels, grid, name="rmse_area", weights=area, per_channel=names)
        persistence = Rmse(channels, grid, name="persistence_rmse", weights=cosine, per_channel=names)
        newest = self.newest()

        def compare(score: Rmse, forecast: Tensor, batch: Batch, valid: Tensor) -> None:
            score.update(self.in_units(forecast), self.in_units(batch.targets), valid)

        parts: dict[str, tuple[Accumulator, Feed]] = {
            "loss": (loss, lambda output, batch, valid: loss.update(output, batch.targets, valid)),
            "rmse": (rmse, lambda output, batch, valid: compare(rmse, output, batch, valid)),
            "rmse_area": (by_area, lambda output, batch, valid: compare(by_area, output, batch, valid)),
        }
        if newest is not None:
            parts["persistence"] = (
                persistence,
                lambda output, batch, valid: compare(persistence, batch.inputs[:, newest], batch, valid),
            )
        return Scoreboard(parts)

    def in_units(self, fields: Tensor) -> Tensor:
        """Targets or forecasts [B, C, H, W] back in their units, float64."""
        samples = self.samples("train")
        mean, std = (part.to(fields.device, torch.float64) for part in (samples.target_mean, samples.target_std))
        return fields.double() * std + mean
