"""The plan of a routing by torch, on any device: which the kernels are tested against.

Dimensions: S choices, N experts, K selected, P pixels, T windows, U pixels of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.kernels.planning.geometry import Family, Geometry
from smoe_hpc.kernels.planning.tiles import MOST_MASK_BITS, Tile

_OUTSIDE = 0xFFFF


def plan_reference(index: Tensor, geometry: Geometry) -> list[Tensor]:
    """The tensors of the plan, on any device; takes memory S T N for each kind of windows."""
    tensors: list[Tensor] = []
    for family in geometry.families:
        pixels, bits = _window_pixels(family, geometry)
        tensors += _list_windows(index, pixels.to(index.device), bits.to(index.device), family, geometry)
    return tensors


def _window_pixels(family: Family, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """For each window [T, U]: number of each output pixel or -1, and the sub-windows it lies in, a bit each."""
    (height, width), (rows, columns) = geometry.grid, family.size
    u, v = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    top = torch.arange(family.tiles[0])[:, None, None, None] * family.step[0]
    left = torch.arange(family.tiles[1])[None, :, None, None] * family.step[1]
    h, w = (top + family.first + u), (left + family.first + v)
    if family.name == "input_grad":
        bits = torch.zeros(*family.tiles, rows, columns, dtype=torch.int64)
        for tap in range(family.mask_bits):
            i, j = divmod(tap, geometry.kernel_size)
            r, c = u - (geometry.kernel_size - 1 - i), v - (geometry.kernel_size - 1 - j)
            reads = (r >= 0) & (r < family.step[0]) & (top + r < family.grid[0])
            reads = reads & (c >= 0) & (c < family.step[1]) & (left + c < family.grid[1])
            bits |= reads.to(torch.int64) << tap if family.mask_bits <= MOST_MASK_BITS else reads * _OUTSIDE
        w = w % width if geometry.wrap else w
    else:
        tile = geometry.tile if family.masked else Tile(rows, columns, 1)
        bits = 1 << (u // tile.rows * (columns // tile.columns) + v // tile.columns)
    bits = bits.expand(*family.tiles, rows, columns)
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & (bits != 0)
    pixels = torch.where(inside, h * width + w, -1)
    return pixels.reshape(-1, rows * columns), bits.reshape(-1, rows * columns)


def _list_windows(index: Tensor, pixels: Tensor, bits: Tensor, family: Family, geometry: Geometry) -> list[Tensor]:
    experts, choices, windows = geometry.num_experts, index.shape[0], pixels.shape[0]
    selected = index.long()[:, pixels.clamp(min=0)]  # [S, T, U, K]
    kept = (pixels >= 0)[None, :, :, None] & (selected >= 0) & (selected < experts)
    selected = torch.where(kept, selected, experts)  # those left out go to a column of their own
    masks = torch.zeros(choices, windows, experts, dtype=torch.int64, device=index.device)
    for bit in range(MOST_MASK_BITS):
        marked = torch.where(((bits >> bit) & 1).bool()[None, :, :, None], selected, experts).flatten(2)
        present = torch.zeros(choices, windows, experts + 1, dtype=torch.int64, device=index.device)
        masks |= present.scatter_(2, marked, 1)[..., :experts] << bit
    counts = (masks != 0).sum(-1)
    order = torch.sort(_rank(masks, family), dim=-1, stable=True).indices
    columns = torch.empty_like(order).scatter_(2, order, torch.arange(experts, device=index.device).expand_as(order))
    columns = torch.cat([columns, columns.new_full((choices, windows, 1), _OUTSIDE)], -1)
    slots = columns.gather(2, selected.flatten(2)).view_as(selected)
    capacity = family.capacity(experts, geometry.selected)
    listed = torch.arange(capacity, device=index.device) < counts[..., None]
    numbers = torch.nn.functional.pad(order, (0, max(capacity - experts, 0)))[..., :capacity]
    found = masks.gather(2, order)
    found = torch.nn.functional.pad(found, (0, max(capacity - experts, 0)))[..., :capacity]
    tensors = [counts.to(torch.int32), torch.where(listed, numbers, 0).to(torch.int32)]
    tensors += [_as_int16(torch.where(listed, found, 0))] if family.masked else []
    return [*tensors, _as_int16(slots)]


def _rank(masks: Tensor, family: Family) -> Tensor:
    """What a list is sorted by; where no bit is set, last."""
    if family.name == "weight_grad":
        rank = masks
        for shift in (1, 2, 4, 8):
            rank = rank ^ (rank >> shift)
        return torch.where(masks == 0, 1 << MOST_MASK_BITS, rank)
    ones = torch.stack([(masks >> bit) & 1 for bit in range(MOST_MASK_BITS)]).sum(0)
    return (MOST_MASK_BITS - ones) << MOST_MASK_BITS | masks


def _as_int16(unsigned: Tensor) -> Tensor:
    """The low 16 bits of each number."""
    return torch.where(unsigned >= 1 << 15, unsigned - (1 << 16), unsigned).to(torch.int16)
