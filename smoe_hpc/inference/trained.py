"""A trained network as a forecaster.

Dimensions: n starts, B starts of a batch, L leads, Ct targets, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from smoe_hpc.config import Recipe, parse_recipe
from smoe_hpc.errors import CheckpointError, ConfigError
from smoe_hpc.inference import labels
from smoe_hpc.inference.inputs import assemble, open_inputs
from smoe_hpc.inference.network import load_network
from smoe_hpc.io.loading.decoding import LEAD_SCALE
from smoe_hpc.io.store import transforms
from smoe_hpc.runs import description
from smoe_hpc.runs.description import Description
from smoe_hpc.runs.layout import MODEL

if TYPE_CHECKING:
    import xarray

    from smoe_hpc.io.store.interface import FieldReader

    Data = str | os.PathLike[str] | FieldReader | xarray.Dataset


class TrainedModel:
    """A network with its weights, and what its inputs and outputs mean.

    Attributes:
        network: maps normalised inputs [B, inputs, H, W] to normalised outputs [B, outputs, H, W]; an ordinary module in
            evaluation mode, whose ``load_state_dict`` takes the tensors of the run's weights.safetensors.
        description: channels, offsets, leads, grid.
        recipe: of the run.
        device: where it computes.
    """

    def __init__(
        self,
        network: nn.Module,
        about: Description,
        recipe: Recipe,
        constants: Tensor | None,
        device: torch.device,
    ) -> None:
        self.network = network.to(device)
        self.description, self.recipe, self.device = about, recipe, device
        self._constants = constants
        self._dtype = torch.float64 if recipe.training.precision == "float64" else torch.float32

    def forecast(
        self, data: Data, starts: Any = None, *, leads: Sequence[int] | None = None, batch: int | None = None
    ) -> xarray.Dataset:
        """Forecasts in physical units.

        Args:
            data: a store (or the path of one, a folder, a pattern), or an xarray Dataset of physical values as
                `open_dataset` gives it or with a variable a channel. It needs the fields at the offsets of each start
                (``description.offsets``); no truth.
            starts: a time (text or datetime64) or several; of a model of runs, (run, step) pairs. None takes every start
                whose inputs are there.
            leads: of a model of continuous lead, hours (its own when None); others have their leads.
            batch: starts computed at once; the recipe's ``training.batch`` when None.

        Returns:
            A variable a target, float32, over ``time`` (the start), ``prediction_timedelta``, ``latitude`` (south to
            north) and ``longitude``, with ``level`` where channels are of pressure levels; of a model of runs over
            ``start``, ``lead``, ``row`` and ``column``.

        Raises:
            DataError: a missing channel, a missing field, another grid, other units, or xarray not installed.
        """
        pieces = list(self.forecasts(data, starts, leads=leads, batch=batch))
        xarray = labels.import_xarray()
        along = next(iter(pieces[0].dims))
        if len(pieces) == 1:
            return pieces[0]
        joined = xarray.concat(pieces, along, data_vars="minimal", coords="minimal", compat="override", join="override")
        joined.attrs = pieces[0].attrs
        return joined

    def forecasts(
        self, data: Data, starts: Any = None, *, leads: Sequence[int] | None = None, batch: int | None = None
    ) -> Iterator[xarray.Dataset]:
        """As `forecast`, a Dataset for each batch of starts, so that any number of them fits the memory."""
        inputs = open_inputs(data, self.description)
        wanted = inputs.all_starts() if starts is None else labels.as_starts(starts, self.description)
        rows = inputs.rows_of(wanted)
        chosen = self._leads(leads)
        size = self.recipe.training.batch if batch is None else batch
        if size < 1:
            raise ConfigError(f"batch={size}: give 1 or more")
        labels.import_xarray()
        return (
            self._piece(inputs, wanted[first : first + size], rows[first : first + size], chosen, size)
            for first in range(0, len(wanted), size)
        )

    def _leads(self, leads: Sequence[int] | None) -> tuple[int, ...]:
        about = self.description
        if leads is None:
            return about.leads
        chosen = tuple(int(lead) for lead in leads)
        if about.lead_mode == "direct" and chosen != about.leads:
            raise ConfigError(f"leads={chosen}: this model forecasts {about.leads} at once; leave leads out")
        if not chosen or min(chosen) <= 0:
            raise ConfigError(f"leads={chosen}: give positive leads")
        return chosen

    def _piece(self, inputs: Any, starts: list[Any], rows: np.ndarray, leads: tuple[int, ...], size: int) -> xarray.Dataset:
        """Forecasts of at most ``size`` starts; the batch is filled up, as evaluation does, for equal arithmetic."""
        about = self.description
        distinct = np.unique(rows)
        told = about.lead_mode == "continuous"
        given = assemble(inputs.read(distinct), rows, distinct, self._constants, int(told))
        x = given.new_zeros(size, *given.shape[1:])
        x[: len(given)] = given
        fields = []
        for lead in leads if told else leads[:1]:
            if told:
                x[: len(given), -1] = lead / LEAD_SCALE
            fields.append(self._in_units(self.predict(x)[: len(given)]))
        values = torch.cat(fields, dim=1).float().cpu().numpy()
        return labels.as_dataset(values, starts, leads, about, self.recipe.name)

    def predict(self, inputs: Tensor) -> Tensor:
        """Normalised outputs [B, outputs, H, W] of normalised inputs, in the recipe's precision."""
        x = inputs.to(self.device, self._dtype)
        half = self.recipe.training.precision == "bf16"
        cast = torch.autocast(self.device.type, dtype=torch.bfloat16) if half else contextlib.nullcontext()
        with torch.no_grad(), cast:
            output: Tensor = self.network(x)
        return output.to(self._dtype)

    def _in_units(self, outputs: Tensor) -> Tensor:
        """[B, D * Ct, H, W] normalised -> [B, D, Ct, H, W] float64 in physical units."""
        targets = self.description.targets
        values = outputs.double().unflatten(1, (-1, len(targets)))
        numbers = torch.tensor([[t.mean, t.std] for t in targets], dtype=torch.float32).double().to(values.device)
        values = values * numbers[:, 1, None, None] + numbers[:, 0, None, None]
        for place, target in enumerate(targets):
            amount = transforms.threshold(target.transform)
            if amount is not None:
                values[:, :, place] = amount * torch.expm1(values[:, :, place])
        return values


def load_run(run: str | os.PathLike[str], device: str | torch.device | None = None) -> TrainedModel:
    """The trained network of a run that has ended, from its folder alone.

    Args:
        run: the folder; of it ``model.json``, ``weights.safetensors`` and ``fixed_fields.safetensors`` are read.
        device: where it computes; the first GPU, or else the CPU, when None.

    Raises:
        CheckpointError: a file that is missing or is not what was written.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a run")
    about = description.read(folder)
    try:
        recipe = parse_recipe(about.recipe, str(folder / MODEL))
    except ConfigError as error:
        raise CheckpointError(f"the recipe in {error}; an other version wrote it, use that one") from None
    network, constants = load_network(folder, about, recipe)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    return TrainedModel(network, about, recipe, constants, chosen)
