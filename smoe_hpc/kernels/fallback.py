"""The expert convolution and its gradients in torch, used where no compiled kernel is.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.

Two forms give the same result. *Dense*: all N F filters everywhere, then a gather; cost N / K times the useful work, in
one well-tuned library call. *Per pixel*: each tap of the filter is a map [K F, H, W] of gathered weights, multiplied with
the shifted input; only useful work, but one pass over the output for each of the C k k taps, so for few channels on a CPU
alone.

On a CPU 16-bit types are computed in float32 and rounded once: torch rounds after each tap, which with hundreds of taps costs
all but a digit, and in a convolution's gradients more than once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.kernels.padding import pad

_CUDNN_EXACT = 3  # size of the largest filters whose weight gradient cuDNN works out directly
_FEW_TAPS = 64  # C K F up to which the per-pixel form is the faster one on a CPU


def forward(x: Tensor, weight: Tensor, indices: Tensor, padding: str) -> Tensor:
    """[B, K F, H, W] of x [B, C, H, W], weight [N, F, C, k, k] and indices [K, H, W] or [B, K, H, W]."""
    if _rounds_often(x):
        return forward(x.float(), weight.to(x.dtype).float(), indices, padding).to(x.dtype)
    padded, weight = pad(x, weight.shape[-1], padding), weight.to(x.dtype)
    if _per_pixel_is_faster(x.shape, weight, indices):
        return _per_pixel(padded, weight, indices)
    with _exact(x):
        every = F.conv2d(padded, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])
    return every.gather(1, _chosen(indices, weight.shape[1], x.shape[0])).flatten(1, 2)


def backward(
    g: Tensor, x: Tensor, weight: Tensor, indices: Tensor, padding: str, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and weight, where they are needed, from g [B, K F, H, W]."""
    if _rounds_often(x):
        wide = g.float(), x.float(), weight.to(x.dtype).float()
        dx, dw = backward(*wide, indices, padding, needs_x, needs_weight)
        return None if dx is None else dx.to(x.dtype), None if dw is None else dw.to(weight.dtype)
    size = weight.shape[-1]
    padded, cast = pad(x, size, padding), weight.to(x.dtype)
    if _per_pixel_is_faster(x.shape, weight, indices):
        grad_padded, grad_weight = _per_pixel_backward(g, padded, cast, indices, needs_x, needs_weight)
    else:
        grad_padded, grad_weight = _dense_backward(g, padded, cast, indices, needs_x, needs_weight)
    return (
        fold(grad_padded, size, padding) if needs_x else None,
        grad_weight.reshape(weight.shape).to(weight.dtype).contiguous() if needs_weight else None,
    )


def fold(padded: Tensor, kernel_size: int, padding: str) -> Tensor:
    """The adjoint of :func:`smoe_hpc.kernels.padding.pad`: [B, C, H + 2r, W + 2r] to [B, C, H, W], edges added back."""
    r = kernel_size // 2
    if r == 0:
        return padded
    height, width = padded.shape[-2] - 2 * r, padded.shape[-1] - 2 * r
    if padding == "zeros":
        return padded[..., r : r + height, r : r + width]
    if padded.itemsize == 2:  # what meets at an edge is added up before it is rounded again
        return fold(padded.float(), kernel_size, padding).to(padded.dtype)
    rows = padded if padding == "sphere" else padded[..., r : r + height, :]
    inner = rows[..., r : r + width].clone()
    inner[..., :r] += rows[..., r + width :]
    inner[..., -r:] += rows[..., :r]
    if padding == "sphere":
        south, north = (edge.flip(-2).roll(width // 2, -1) for edge in (inner[..., :r, :], inner[..., -r:, :]))
        inner = inner[..., r : r + height, :].clone()
        inner[..., :r, :] += south
        inner[..., -r:, :] += north
    return inner


def _rounds_often(x: Tensor) -> bool:
    """Whether torch would round sums to the 16 bits of this tensor; a GPU's library keeps them in float32."""
    return x.itemsize == 2 and x.device.type == "cpu"


@contextlib.contextmanager
def _exact(x: Tensor) -> Iterator[None]:
    """Convolutions and products of float32 on a GPU without TF32, which torch allows by default and which has 10 bits."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        yield
        return
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def _dense_backward(
    g: Tensor, padded: Tensor, weight: Tensor, indices: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    spread = g.new_zeros(g.shape[0], *weight.shape[:2], *g.shape[2:])
    spread.scatter_add_(1, _chosen(indices, weight.shape[1], g.shape[0]), g.unflatten(1, (-1, weight.shape[1])))
    every, by_taps = spread.flatten(1, 2), needs_weight and g.device.type == "cuda" and weight.shape[-1] > _CUDNN_EXACT
    with _exact(g):
        grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(
            every, padded, weight.flatten(0, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [needs_x, needs_weight and not by_taps, False],
        )  # fmt: skip
        return grad_padded, _weight_gradient_by_taps(every, padded, weight.shape[-1]) if by_taps else grad_weight


def _weight_gradient_by_taps(every: Tensor, padded: Tensor, size: int) -> Tensor:
    """[N F, C, k, k] of the gradient at all experts [B, N F, H, W]: a matrix product for each tap, summed in float32.

    For filters larger than 3 x 3 cuDNN transforms both maps on the way, which loses three digits.
    """
    height, width = every.shape[2:]
    rows, seen = every.permute(1, 0, 2, 3).flatten(1), padded.permute(0, 2, 3, 1)
    shifted = [seen[:, i : i + height, j : j + width].flatten(0, 2) for i in range(size) for j in range(size)]
    if every.itemsize == 2:
        return torch.stack([torch.mm(rows, x, torch.float32) for x in shifted], dim=-1)
    return torch.stack([torch.mm(rows, x) for x in shifted], dim=-1)


def _chosen(indices: Tensor, filters: int, batch: int) -> Tensor:
    """[B, K, F, H, W]: the expert of every output."""
    return indices.to(torch.int64).expand(batch, -1, -1, -1).unsqueeze(2).expand(-1, -1, filters, -1, -1)


def _per_pixel_is_faster(shape: torch.Size, weight: Tensor, indices: Tensor) -> bool:
    selected = indices.shape[-3]
    few = shape[1] * selected * weight.shape[1] <= _FEW_TAPS
    return few and indices.dim() == 3 and weight.device.type == "cpu" and weight.shape[0] > selected


def _per_pixel(padded: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    taps = _tap_weights(weight, indices)  # [C k k, K F, H, W]
    shifted = _shifted(padded, weight.shape[-1])
    output = shifted[0] * taps[0]
    for tap, seen in zip(taps[1:], shifted[1:], strict=True):
        output.addcmul_(seen, tap)
    return output


def _per_pixel_backward(
    g: Tensor, padded: Tensor, weight: Tensor, indices: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    size = weight.shape[-1]
    grad_padded, grad_weight = torch.zeros_like(padded) if needs_x else padded, weight
    if needs_x:
        for tap, shifted in zip(_tap_weights(weight, indices), _shifted(grad_padded, size), strict=True):
            shifted += (g * tap).sum(1, keepdim=True)
    if needs_weight:
        num_experts, filters, channels = weight.shape[:3]
        per_pixel = torch.stack([torch.linalg.vecdot(g, shifted, dim=0) for shifted in _shifted(padded, size)], dim=-1)
        per_pixel = per_pixel.unflatten(0, (-1, filters)).movedim(1, -2)  # [K, H, W, F, C k k]
        summed = per_pixel.new_zeros(num_experts, filters * channels * size * size)
        summed.index_add_(0, indices.flatten(), per_pixel.reshape(-1, summed.shape[1]))
        grad_weight = summed
    return grad_padded, grad_weight


def _tap_weights(weight: Tensor, indices: Tensor) -> Tensor:
    """[C k k, K F, H, W]: for every tap of the filters, the weight each pixel's selected experts give it."""
    taps = weight.flatten(2).permute(2, 1, 0)  # [C k k, F, N]
    everywhere = indices.to(torch.int64).flatten().expand(*taps.shape[:2], -1)
    return taps.gather(2, everywhere).unflatten(2, indices.shape).movedim(1, 2).flatten(1, 2)


def _shifted(padded: Tensor, size: int) -> list[Tensor]:
    """Views [B, 1, H, W] of the input as each tap sees it, in the order of :func:`_tap_weights`."""
    height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
    return [
        padded[:, channel : channel + 1, row : row + height, column : column + width]
        for channel in range(padded.shape[1])
        for row in range(size)
        for column in range(size)
    ]
