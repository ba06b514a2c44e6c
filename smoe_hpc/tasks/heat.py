"""Location-dependent heat diffusion (Dryden and Hoefler 2022): one state to the next.

Where the data holds noisy observations, the model is trained and chosen on them, as with real data, and scored beside
the true states, which only a synthetic experiment has.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from smoe_hpc.config.making import heat_command, how_to_make
from smoe_hpc.errors import DataError
from smoe_hpc.files.regular import NotPlainError, parse_json
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.store.reader import Store
from smoe_hpc.io.synthetic.heat import OBSERVED, STATE, split_path
from smoe_hpc.layers import SpatialMoE2d, spatial_layers
from smoe_hpc.runs import Selection
from smoe_hpc.scores import Accumulator, Mse, Rmse, RoutingAgreement, Within, region_masks
from smoe_hpc.tasks.base import Feed, Scoreboard, StoreTask


class HeatTask(StoreTask):
    """x_t -> x_t+1 on a plane with three regions of different diffusivity; mean squared error.

    Scores, overall and per region: ``within_1pct`` (% of points within 1 % of the true state), ``rmse`` (of the true
    state) and ``loss`` (of the target; with noise, the training split has this alone); for an SMoE layer of one
    selected expert ``routing_agreement`` with the regions.

    Args:
        recipe: with ``data.store`` a folder of heat_train.h5, heat_validation.h5 and heat_test.h5.

    Raises:
        DataError: data that is missing, damaged or made with other noise.
    """

    @property
    def noisy(self) -> bool:
        """Whether targets are noisy observations."""
        return self.recipe.data.noise > 0

    @property
    def selection(self) -> Selection:
        """% within 1 % on validation; with noisy targets their loss, because the truth is not for choosing by."""
        if self.noisy:
            return Selection("validation", "all", "loss", "min")
        return Selection("validation", "all", "within_1pct", "max")

    def open_samples(self, split: str) -> Samples:
        """Samples of a split: targets ``heat``; with noise ``observed``, and ``heat`` behind it where it is scored."""
        data = self.recipe.data
        store = Store(split_path(data.store, split, self._remedy()))
        self._check_noise(store)
        targets = [STATE]
        if self.noisy:
            targets = [OBSERVED] if split == "train" else [OBSERVED, STATE]
        runs = data.splits[split]
        window = Window(tuple(data.inputs), (data.lead,))
        return Samples(store, window, Split(runs) if runs else None, [STATE], targets, order=self.order)

    def _remedy(self) -> str:
        """What makes the data that are missing."""
        if Path(self.recipe.data.store).is_file():
            return "data.store is a file: set it to a folder of heat_train.h5, heat_validation.h5 and heat_test.h5"
        return f"make it with {how_to_make(self.recipe)}"

    def _check_noise(self, store: Store) -> None:
        try:
            made_with = parse_json(str(store.attributes.get("recipe", "{}")))
        except NotPlainError as error:
            again = heat_command(self.recipe, overwrite=True)
            raise DataError(f"{store.path}: its attribute 'recipe' {error}; make the data with `{again}`") from error
        wanted = {"noise": self.recipe.data.noise}
        if self.noisy:
            wanted["noise_ratio"] = self.recipe.data.noise_ratio
        for name, value in wanted.items():
            if name in made_with and made_with[name] != value and self.noisy:
                found = f"{made_with[name]:g}" if isinstance(made_with[name], (int, float)) else f"{made_with[name]!r:.40}"
                raise DataError(
                    f"{store.path} was made with {name}={found} but the recipe says data.{name}={value:g}; "
                    f"set data.{name}={found}, or replace it: `{heat_command(self.recipe, overwrite=True)}`"
                )
        if self.noisy and OBSERVED not in store.channels:
            raise DataError(
                f"{store.path} holds no noisy observations but the recipe says data.noise={self.recipe.data.noise:g}; "
                f"replace it: `{heat_command(self.recipe, overwrite=True)}`, or set data.noise=0"
            )

    def region_map(self) -> Tensor:
        """[H, W] int64, the true regions."""
        store = self.samples("train").store
        if "region" not in store.constants:
            raise DataError(f"{store.path} has no constant 'region'; set data.store to data that `smoe-hpc data heat` has made")
        return torch.from_numpy(store.constants["region"].astype("int64"))

    def newest(self) -> list[int]:
        """The newest state is the last input channel."""
        return [self.samples("train").in_channels - 1]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of the target (the observed state where there is noise)."""
        return (output - batch.targets[:, :1]).square().mean()

    def score(self, split: str) -> Scoreboard:
        """Scores of a split; those of routing look at the model that `build_model` made last."""
        grid = self.grid.shape
        regions = region_masks(self.region_map(), grid)
        within = Within(1, grid, regions=regions)
        rmse = Rmse(1, grid, regions=regions, name="rmse")
        loss = Mse(1, grid, regions=regions, name="loss")
        parts: dict[str, tuple[Accumulator, Feed]] = {
            "loss": (loss, lambda output, batch, valid: loss.update(output, batch.targets[:, :1], valid)),
        }
        if STATE in self.samples(split).target_channels:  # the last target; the only one where there is no noise
            parts["within"] = (within, lambda output, batch, valid: within.update(output, batch.targets[:, -1:], valid))
            parts["rmse"] = (rmse, lambda output, batch, valid: rmse.update(output, batch.targets[:, -1:], valid))
        layer = None if self.model is None else routed_by_region(self.model)
        if layer is not None:
            agreement = RoutingAgreement(self.region_map(), layer.num_experts)
            parts["routing"] = (
                agreement,
                lambda output, batch, valid: agreement.add(routing_of(layer, batch.inputs), valid),
            )
        return Scoreboard(parts)


def routed_by_region(model: nn.Module) -> SpatialMoE2d | None:
    """The layer whose routing can be held against regions: one selected expert a pixel, read from parameters or from
    the model's own input; the last such layer, None where there is none."""
    fitting = [
        layer
        for number, layer in enumerate(spatial_layers(model))
        if layer.selected == 1 and (number == 0 or not layer.gate.depends_on_input)
    ]
    return fitting[-1] if fitting else None


def routing_of(layer: SpatialMoE2d, inputs: Tensor) -> Tensor:
    """Experts that the layer selects outside training: [K, H, W], or [B, K, H, W] where samples have their own.

    Args:
        layer: of a model that reads ``inputs`` [B, C, H, W].
        inputs: read by gates that depend on them.
    """
    training = layer.gate.training
    layer.gate.eval()
    try:
        with torch.no_grad():
            return layer.gate.routing(layer.gate(inputs)[0], layer.expert_order).indices
    finally:
        layer.gate.train(training)
