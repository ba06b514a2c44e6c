"""From stored fields to batches of tensors, on the device that trains: the same for every way of reading.

Stored numbers are brought to normalised values by one subtraction and one division in float32, with
``value = stored * scale + offset`` and ``normalised = (value - mean) / std`` folded into each other:
``(stored - (mean - offset) / scale) / (std / scale)``, the two numbers of a channel found in float64. Where fields are
stored as float32 without scale or offset this is ``(x - mean) / std``. Dividing, unlike multiplying by a rounded
reciprocal, rounds once; both operations are rounded correctly everywhere, so CPU and GPU give the same bits.

Dimensions: B batch, I input fields, D target fields of a sample, C channels read of each input field, Ct of each target, K
constants, H latitude rows, W longitude columns, U and V distinct fields read for inputs and targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.batch_plan import BatchPlan
from smoe_hpc.io.loading.frames import FrameTable
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.store.encoding import Encoding

LEAD_SCALE = 100.0  # hours: a lead of some days is a number near one
Scaling = tuple[Tensor, Tensor] | None
"""What is subtracted from stored numbers and what they are divided by, [C, 1, 1] float32; None where they are the result."""


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """A batch as it was read; valid until the next one is asked for.

    Args:
        plan: how samples are made of the fields.
        packed: the plan, packed, where it is decoded.
        frames: [U, C, H, W] of the stored type, where they are decoded.
        target_frames: [V, Ct, H, W], likewise.
    """

    plan: BatchPlan
    packed: Tensor
    frames: Tensor
    target_frames: Tensor


def scaling_of(encoding: Encoding, statistics: Statistics | None, channels: Sequence[str]) -> Scaling:
    """What normalises stored numbers of this encoding; values stay in their units where there are no statistics.

    Raises:
        DataError: statistics of other channels.
    """
    if statistics is None and encoding.is_identity:
        return None
    mean, std = np.zeros(len(channels)), np.ones(len(channels))
    if statistics is not None:
        indices = statistics.channel_indices(channels)
        mean, std = np.array(statistics.mean)[indices], np.array(statistics.std)[indices]
    parts = (mean - encoding.offset) / encoding.scale, std / encoding.scale
    shift, width = (torch.from_numpy(part.astype(np.float32))[:, None, None] for part in parts)
    return shift, width


class Decoder:
    """Makes batches of what was read.

    Args:
        table: what is read.
        inputs: what normalises the input channels.
        targets: what normalises the target channels.
        constants: [K, H, W] float32, normalised.
        device: where.
        dtype: of the batches' inputs and targets; decoding itself is in float32.
    """

    def __init__(
        self,
        table: FrameTable,
        inputs: Scaling,
        targets: Scaling,
        constants: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._table, self._device, self._dtype = table, torch.device(device), dtype
        self._inputs, self._targets = (
            None if scaling is None else (scaling[0].to(self._device), scaling[1].to(self._device))
            for scaling in (inputs, targets)
        )
        self._constants = constants.to(self._device)
        self._gathered: dict[str, Tensor] = {}  # on the CPU: memory that is used again

    def __call__(self, stored: StoredBatch) -> Batch:
        """The batch, in new memory, made on the current stream."""
        table, plan, (height, width) = self._table, stored.plan, self._table.store.grid.shape
        batch, filled = len(plan.ids), plan.filled_up
        fields, constants, lead = len(plan.input_index) * len(table.input_channels), len(self._constants), table.window.by_lead
        inputs = torch.empty((batch, fields + constants + lead, height, width), device=self._device)
        shape = (batch, len(plan.target_index) * len(table.target_channels), height, width)
        targets = torch.empty(shape, device=self._device)
        on_device = plan.lists_of(stored.packed)
        ids, leads = (part.clone() for part in on_device[:2])  # the packed plan is memory that is used again
        input_index, target_index = on_device[2:]
        if len(filled) == batch:
            inputs.zero_()
            targets.zero_()
        else:
            self._put(stored.frames, None if plan.inputs_in_order else input_index, self._inputs, inputs[:, :fields], "inputs")
            if targets.numel():
                index = None if plan.targets_in_order else target_index
                self._put(stored.target_frames, index, self._targets, targets, "targets")
            if constants:
                inputs[:, fields : fields + constants] = self._constants
            if lead:
                inputs[:, -1] = (leads.to(torch.float32) / LEAD_SCALE)[:, None, None]
            for entry in filled:
                inputs[entry], targets[entry] = 0, 0
        starts, grid = table.starts_of(plan), table.store.grid
        return Batch(inputs.to(self._dtype), targets.to(self._dtype), ids, leads, starts, grid)

    def _put(self, stored: Tensor, index: Tensor | None, scaling: Scaling, out: Tensor, name: str) -> None:
        """Normalised fields into ``out`` [B, n * c, H, W]; ``index`` is [n, B], None means each field once, in order."""
        channels = stored.shape[1]
        per_field = out.unflatten(1, (-1, channels))  # [B, n, c, H, W]
        if index is not None:
            order = index.t().reshape(-1)
            if out.is_contiguous() and stored.dtype == out.dtype:  # no memory in between
                gathered = torch.index_select(stored, 0, order, out=out.view(-1, *stored.shape[1:]))
            else:
                gathered = torch.index_select(stored, 0, order, out=self._memory(name, stored, len(order)))
            stored = gathered
        stored = stored.view(per_field.shape)
        if scaling is not None:
            torch.sub(stored, scaling[0], out=per_field)  # int16 and float16 are raised to float32 first
            per_field.div_(scaling[1])
        elif stored.data_ptr() != per_field.data_ptr():
            per_field.copy_(stored)

    def _memory(self, name: str, like: Tensor, count: int) -> Tensor:
        """[count, c, H, W] as ``like``: kept on the CPU, from torch's own pool on a GPU."""
        shape = (count, *like.shape[1:])
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=like.dtype, device=self._device)
        if name not in self._gathered or self._gathered[name].shape != shape:
            self._gathered[name] = torch.empty(shape, dtype=like.dtype)
        return self._gathered[name]
