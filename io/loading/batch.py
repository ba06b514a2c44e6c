"""What a model is given: samples side by side, and where and when they are.

Dimensions: B batch, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side.

    Args:
        inputs: [B, inputs, H, W]: input fields, oldest first, each with all its channels; then constants; then, where each
            sample has a lead of its own, a channel of hours / 100.
        targets: [B, targets, H, W]: leads in order, each with all its channels; [B, 0, H, W] where the truth is not known.
        ids: [B] int64 id of each sample (see `Samples`); -1 where a batch was filled up (all zeros, to be masked).
        leads: [B] int64 lead of each sample; 0 where all samples have the same leads.
        starts: coordinates of each sample's start, from which leads count, by name: ``time`` [B] datetime64[s], or ``run`` and
            ``step`` [B] int64; in host memory. NaT and -1 where a batch was filled up.
        grid: the points of inputs and targets.
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor
    leads: Tensor
    starts: Mapping[str, np.ndarray]
    grid: Grid

    @property
    def valid(self) -> Tensor:
        """[B] bool: which entries are samples."""
        return self.ids >= 0

    @property
    def times(self) -> np.ndarray:
        """[B] datetime64[s]: when each sample starts, which is the time of its newest input where inputs end at 0.

        Raises:
            DataError: samples of runs.
        """
        if "time" not in self.starts:
            raise DataError(f"these samples have no times; they are named by {', '.join(self.starts)}: see Batch.starts")
        return self.starts["time"]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same on a device; inputs and targets in ``dtype`` when given. Nothing is copied that is there already."""
        return replace(
            self,
            inputs=self.inputs.to(device=device, dtype=dtype),
            targets=self.targets.to(device=device, dtype=dtype),
            ids=self.ids.to(device=device),
            leads=self.leads.to(device=device),
        )
