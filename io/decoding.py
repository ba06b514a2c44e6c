"""From stored fields to batches of tensors, on the device that trains: the same for every way of reading.

Stored numbers are brought to normalised values by one subtraction and one division in float32, with
``value = stored * scale + offset`` and ``normalised = (value - mean) / std`` folded into each other:
``(stored - (mean - offset) / scale) / (std / scale)``, the two numbers of a channel found in float64. Where fields are
stored as plain float32 this is ``(x - mean) / std``. Dividing, unlike multiplying by a rounded reciprocal, rounds once;
both operations are rounded correctly everywhere, so CPU and GPU give the same bits.

Dimensions: B batch, I input fields, D leads of a sample, C channels read of each input field, Ct of each target, K
constants, H latitude rows, W longitude columns, U and V fields read for inputs and targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.io.encoding import Encoding
from smoe_hpc.io.reading import HEADER, FrameTable
from smoe_hpc.io.statistics import Statistics

LEAD_SCALE = 100.0  # hours: a lead of some days is a number near one


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side.

    Args:
        inputs: [B, inputs, H, W]: input fields, oldest first, each with all its channels; then constants; then, where each
            sample has a lead of its own, a channel of hours / 100.
        targets: [B, targets, H, W]: leads in order, each with all its channels.
        ids: [B] int64 item of each sample (see `Samples`); -1 where a batch was filled up (all zeros, to be masked).
        leads: [B] int64 lead of each sample; 0 where all samples have the same leads.
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor
    leads: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """[B] bool: which entries are samples."""
        return self.ids >= 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same on a device; inputs and targets in ``dtype`` when given. Nothing is copied that is there already."""
        return replace(
            self,
            inputs=self.inputs.to(device=device, dtype=dtype),
            targets=self.targets.to(device=device, dtype=dtype),
            ids=self.ids.to(device=device),
            leads=None if self.leads is None else self.leads.to(device=device),
        )


@dataclass(frozen=True, eq=False)
class Raw:
    """A batch as it was read; valid until the next one is asked for.

    Args:
        frames: [U, C, H, W] of the stored type, where it is decoded.
        target_frames: [V, Ct, H, W], likewise.
        header: int64 as `Need.header` has it, where it is decoded.
        plan: the same in host memory.
    """

    frames: Tensor
    target_frames: Tensor
    header: Tensor
    plan: np.ndarray


@dataclass(frozen=True, eq=False)
class Scaling:
    """What normalises stored numbers of some channels.

    Args:
        shift: [C, 1, 1] float32.
        width: likewise; both None where stored numbers are the result.
    """

    shift: Tensor | None = None
    width: Tensor | None = None

    @classmethod
    def of(cls, encoding: Encoding, statistics: Statistics | None, channels: list[str]) -> Scaling:
        """For channels of this encoding; values stay in their units where there are no statistics.

        Raises:
            DataError: statistics of other channels.
        """
        if statistics is None and encoding.plain:
            return cls()
        mean, std = np.zeros(len(channels)), np.ones(len(channels))
        if statistics is not None:
            statistics.select(channels)  # refuses other channels
            places = [statistics.channels.index(name) for name in channels]
            mean, std = np.array(statistics.mean)[places], np.array(statistics.std)[places]
        parts = (mean - encoding.offset) / encoding.scale, std / encoding.scale
        return cls(*(torch.from_numpy(part.astype(np.float32))[:, None, None] for part in parts))

    def to(self, device: torch.device) -> Scaling:
        """The same on a device."""
        if self.shift is None or self.width is None:
            return self
        return Scaling(self.shift.to(device), self.width.to(device))

    def apply(self, stored: Tensor, out: Tensor) -> None:
        """Normalise ``stored`` [..., C, H, W] into ``out`` of the same shape, float32."""
        if self.shift is None or self.width is None:
            out.copy_(stored)
        else:
            torch.sub(stored, self.shift, out=out)  # int16 and float16 are raised to float32 first
            out.div_(self.width)


class Decoder:
    """Makes batches of raw ones.

    Args:
        table: what was read.
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
        self._inputs, self._targets = inputs.to(self._device), targets.to(self._device)
        self._constants = constants.to(self._device)
        self._gathered: dict[str, Tensor] = {}  # on the CPU: memory that is used again

    def __call__(self, raw: Raw) -> Batch:
        """The batch, in new memory, made on the current stream."""
        table, (height, width) = self._table, self._table.store.grid.shape
        each, of_targets, constants = table.inputs_each, table.targets_each, len(self._constants)
        fields, lead = each * len(table.input_channels), int(table.by_lead)
        batch = (len(raw.plan) - HEADER) // (2 + each + of_targets)
        lists = raw.header[HEADER:].view(-1, batch)
        ids, leads = lists[:2].clone()
        places, target_places = lists[2 : 2 + each], lists[2 + each :]
        inputs = torch.empty((batch, fields + constants + lead, height, width), device=self._device)
        targets = torch.empty((batch, of_targets * len(table.target_channels), height, width), device=self._device)
        filled = np.flatnonzero(raw.plan[HEADER : HEADER + batch] < 0).tolist()
        if len(filled) == batch:
            return Batch(inputs.zero_().to(self._dtype), targets.zero_().to(self._dtype), ids, leads)
        self._put(raw.frames, None if raw.plan[0] else places, self._inputs, inputs[:, :fields], "inputs")
        self._put(raw.target_frames, None if raw.plan[1] else target_places, self._targets, targets, "targets")
        if constants:
            inputs[:, fields : fields + constants] = self._constants
        if lead:
            inputs[:, -1] = (leads.to(torch.float32) / LEAD_SCALE)[:, None, None]
        for entry in filled:
            inputs[entry], targets[entry] = 0, 0
        return Batch(inputs.to(self._dtype), targets.to(self._dtype), ids, leads)

    def _put(self, stored: Tensor, places: Tensor | None, scaling: Scaling, out: Tensor, name: str) -> None:
        """Normalised fields into ``out`` [B, n * c, H, W]; ``places`` is [n, B], None means each field once, in order."""
        channels = stored.shape[1]
        per_field = out.unflatten(1, (-1, channels))  # [B, n, c, H, W]
        if places is not None:
            order = places.t().reshape(-1)
            if out.is_contiguous() and stored.dtype == out.dtype:  # no memory in between
                gathered = torch.index_select(stored, 0, order, out=out.view(-1, *stored.shape[1:]))
            else:
                gathered = torch.index_select(stored, 0, order, out=self._memory(name, stored, len(order)))
            stored = gathered
        stored = stored.view(per_field.shape)
        if stored.data_ptr() != per_field.data_ptr() or scaling.shift is not None:
            scaling.apply(stored, per_field)

    def _memory(self, name: str, like: Tensor, count: int) -> Tensor:
        """[count, c, H, W] as ``like``: kept on the CPU, from torch's own pool on a GPU."""
        shape = (count, *like.shape[1:])
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=like.dtype, device=self._device)
        if name not in self._gathered or self._gathered[name].shape != shape:
            self._gathered[name] = torch.empty(shape, dtype=like.dtype)
        return self._gathered[name]
