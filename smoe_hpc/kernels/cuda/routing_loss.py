"""The routing loss on a CUDA device: bindings of ``csrc/cuda/routing_loss``.

Launches of a backward with one expert filter and 16-bit gradients: count magnitudes, select, label and damp, gate gradient,
loss. The gradient is read twice and written once; the gate's values are read once, their gradient is written once. Nothing
depends on data but the results: the sequence can be captured in a CUDA graph.

Dimensions: B batch, N experts, K selected, F filters per expert, H latitude rows, W longitude columns, P = H W pixels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.library import available, call
from smoe_hpc.kernels.cuda.task import TYPES
from smoe_hpc.kernels.routing_loss.request import Request

_MAGNITUDES = 1 << 15  # of a 16-bit number
_LEVEL_BYTES = 4 * 24604  # RowWork of quantiles.cu
_COUNTED_AT_LEAST = 1 << 14  # values of a row that are worth a block of their own
_TILE, _ROWS = 32, 64  # pixels of a block of gate_gradient, and experts it looks at together
_LOADING = 128  # experts that a block could have dealt with while it reads the selections


def serves(tensor: Tensor) -> bool:
    """Whether the kernels take tensors of this device and type."""
    return tensor.dtype in TYPES and available(tensor.device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _counts_magnitudes(device: int) -> bool:
    """Whether a block's shared memory can hold a histogram of all 16-bit magnitudes, and a little more."""
    properties: Any = torch.cuda.get_device_properties(device)  # whose type does not list them all
    return int(properties.shared_memory_per_block_optin) >= 4 * _MAGNITUDES + 1024


def _neighbours(quantile: float, size: int) -> tuple[int, float, float]:
    """The index just below a quantile in ``size`` sorted values, and how far the quantile is from that and from the next."""
    position = quantile * (size - 1)
    below = math.floor(position)
    return below, position - below, 1.0 - (position - below)


def quantiles_of(
    rows: Tensor,
    quantiles: tuple[float, ...],
    *,
    half_numel: float = 0.0,
    scale: Tensor | None = None,
    factors: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Quantiles [len(quantiles), B] of each of B rows, float32.

    Args:
        rows: [B, ...], dense; the order of memory within a row does not matter. [B, K, H, W] if there is a divisor.
        quantiles: one or two.
        half_numel: other than 0, the quantiles are those of errors, |rows * factors| * half_numel / scale / divisor.
        scale: 0-d float32.
        factors: laid out like ``rows``.
        divisor: [H, W] float32.

    Raises:
        Unsupported: empty rows, or more than 2^31 values in one.
    """
    batch = rows.shape[0]
    size = rows.numel() // max(batch, 1)
    device = rows.get_device()
    at_once = bool(half_numel) and rows.dtype != torch.float32 and divisor is None and _counts_magnitudes(device)
    room = (1 if at_once else 2) * _multiprocessors(device) // max(batch, 1)  # blocks that run together
    parts = max(1, min(room, -(-size // _COUNTED_AT_LEAST)))
    result = torch.empty(len(quantiles), batch, dtype=torch.float32, device=rows.device)
    wanted = (len(quantiles), *_neighbours(quantiles[0], size), *_neighbours(quantiles[-1], size), parts)
    sizes = (scale, half_numel, TYPES[rows.dtype], batch, size)
    if at_once:
        bytes_of_work = batch * parts * (4 * _MAGNITUDES + 32) if parts > 1 else 16
        work = torch.empty(bytes_of_work, dtype=torch.uint8, device=rows.device)
        call("smoe_row_quantiles_at_once", rows, factors, *sizes, *wanted, work, result)
    else:
        work = torch.empty(batch * _LEVEL_BYTES, dtype=torch.uint8, device=rows.device)
        call("smoe_row_quantiles", rows, factors, *_divided(rows, divisor), *sizes, *wanted, work, result)
    return result


def _divided(errors: Tensor, divisor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The divisor and how errors [B, K, H, W] in memory walk over its pixels: PixelWalk of routing_loss.cuh."""
    if divisor is None:
        return None, 1, 0
    last = not errors.is_contiguous()
    return divisor, errors.shape[1] if last else divisor.numel(), int(last)


def label_and_damp(
    grad: Tensor, scale: Tensor | None, before_weighting: Tensor | None, error_divisor: Tensor | None, request: Request
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What :func:`smoe_hpc.kernels.routing_loss.operators.label_and_damp` says, in its order; None for what is not wanted.

    Raises:
        Unsupported: sizes that the kernels do not support.
    """
    filters, quantile, tolerance, damping_quantile, damping_tolerance, damping_factor, each, wants_errors = request
    batch, channels, height, width = grad.shape
    selected, pixels = channels // filters, height * width
    labels, damps, weighted = quantile is not None, damping_quantile is not None, before_weighting is not None
    formed = filters > 1  # errors of several values are formed first, others on the way
    last = not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    inner = torch.channels_last if formed or wants_errors else layout
    grad = grad.contiguous(memory_format=inner)
    if before_weighting is not None:
        before_weighting = before_weighting.contiguous(memory_format=inner)
    scale = None if scale is None else scale.to(torch.float32)
    divisor = None if error_divisor is None else error_divisor.to(torch.float32).contiguous()
    half_numel, kind = grad.numel() / 2, TYPES[grad.dtype]

    def form(factors: Tensor | None, errors: Tensor | None, sums: Tensor | None) -> None:
        sizes = (kind, batch, selected, filters, pixels)
        call("smoe_selection_errors", grad, factors, scale, divisor, half_numel, *sizes, errors, sums)

    def quantiles(errors: Tensor | None, factors: Tensor | None, asked: tuple[float, ...]) -> Tensor:
        if errors is not None:
            return quantiles_of(errors, asked)
        return quantiles_of(grad, asked, half_numel=half_numel, scale=scale, factors=factors, divisor=divisor)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=grad.device)

    error_sum = new(height, width) if wants_errors else None
    own_errors = new(batch, pixels, selected) if formed and (damps or (labels and not weighted)) else None
    if own_errors is not None or error_sum is not None:
        form(None, own_errors, error_sum)
    label_errors = own_errors
    if formed and labels and weighted:
        label_errors = new(batch, pixels, selected)
        form(before_weighting, label_errors, None)
    of_labels = of_damping = None
    if quantile is not None and damping_quantile is not None and not weighted:
        found = quantiles(own_errors, None, (quantile,) if quantile == damping_quantile else (quantile, damping_quantile))
        of_labels, of_damping = found[0], found[-1]
    else:
        if quantile is not None:
            of_labels = quantiles(label_errors, before_weighting, (quantile,))[0]
        if damping_quantile is not None:
            of_damping = quantiles(own_errors, None, (damping_quantile,))[0]
    if not labels and not damps:
        return None, None, error_sum
    damped = torch.empty_like(grad) if damps else None
    counts = _new_counts(grad, selected, each, inner) if labels else None
    call(
        "smoe_label_and_damp",
        grad,
        None if formed else before_weighting,
        label_errors if labels else None,
        own_errors if damps else None,
        *_divided(grad, None if formed else divisor),
        scale,
        half_numel,
        kind,
        of_labels,
        tolerance,
        of_damping,
        damping_tolerance,
        damping_factor,
        damped,
        counts,
        int(each),
        batch,
        filters,
        channels,
        channels * pixels,
    )
    return counts, damped if damped is None else damped.contiguous(memory_format=layout), error_sum


def _new_counts(grad: Tensor, selected: int, each: bool, layout: torch.memory_format) -> Tensor:
    """[K, H, W] or [B, K, H, W] float32, the selections of a pixel side by side where the channels are."""
    batch, _, height, width = grad.shape
    if layout == torch.contiguous_format:
        shape = (batch, selected, height, width) if each else (selected, height, width)
        return torch.empty(shape, dtype=torch.float32, device=grad.device)
    shape = (batch, height, width, selected) if each else (height, width, selected)
    return torch.empty(shape, dtype=torch.float32, device=grad.device).movedim(-1, -3)


@functools.cache
def _experts_of_a_block(tiles: int, num_experts: int, at_once: int) -> int:
    """Experts a block, chosen so that the blocks finish soonest: ``at_once`` run together, each reads the selections first."""
    choices = {-(-num_experts // splits) for splits in range(1, -(-num_experts // _ROWS) + 1)}
    return min(choices, key=lambda each: (-(-tiles * -(-num_experts // each) // at_once) * (each + _LOADING), -each))


def gate_gradient(
    values: Tensor, counts: Tensor, indices: Tensor, scale: Tensor | None, batch: int, share: float
) -> tuple[Tensor, Tensor]:
    """What :func:`smoe_hpc.kernels.routing_loss.operators.gate_gradient` says.

    Raises:
        Unsupported: sizes that the kernels do not support.
    """
    values = values.contiguous()
    num_experts, pixels = values.shape[-3], values.shape[-2] * values.shape[-1]
    selected = indices.shape[-3]
    counts = counts.to(torch.float32).flatten(-2)
    if indices.dtype != torch.int32:
        indices = indices.to(torch.int64)
    indices = indices.flatten(-2)
    if counts.dim() == 3:
        indices = indices.expand(batch, -1, -1)
    if scale is not None:
        scale = scale.to(torch.float32)
    grad = torch.empty_like(values)
    loss = torch.empty((), dtype=torch.float32, device=values.device)
    strides = [(0, *t.stride()) if t.dim() == 2 else t.stride() for t in (counts, indices)]
    known = (values, counts, *strides[0], indices, *strides[1], int(indices.dtype == torch.int64), scale, share)
    sms = _multiprocessors(values.get_device())
    if counts.dim() == 3 and values.dim() == 3:
        blocks = 4 * sms
        partial = torch.empty(blocks, dtype=torch.float64, device=values.device)
        labels = torch.empty(num_experts * pixels * 2 + pixels, dtype=torch.int32, device=values.device)
        call(
            "smoe_gate_gradient_own",
            *known,
            batch,
            num_experts,
            selected,
            pixels,
            blocks,
            labels,
            grad,
            partial,
            loss,
        )
        return grad, loss
    maps, of_each = (values.shape[0], 1) if values.dim() == 4 else (1, batch)
    tiles = -(-pixels // _TILE) * maps
    experts_each = _experts_of_a_block(tiles, num_experts, 2 * sms)
    partial = torch.empty(tiles * -(-num_experts // experts_each), dtype=torch.float64, device=values.device)
    call(
        "smoe_gate_gradient",
        *known,
        maps,
        of_each,
        num_experts,
        selected,
        pixels,
        experts_each,
        grad,
        partial,
        loss,
    )
    return grad, loss
