"""What a user would take in place of our kernels, written as a user would write it.

* :func:`conv_gather`: a convolution with the filters of all experts, then a gather; eager or compiled, in two layouts.
* :func:`published`: the layer in the manner of its authors (paper, sections 2 and 3): every sample has its own copy of the
  gate and selects from it, errors are sorted for their quantile, the labels of the routing loss are a full tensor, and a
  second backward brings the gate its gradient.
* :func:`plain`: a convolution with K F outputs, which has no experts at all: the cost that a layer cannot well go below.

Each gives, for a part of the work, a call without arguments, or None where it has no such part.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.bench.layer.case import Shape
from smoe_hpc.files.caches import own_folder
from smoe_hpc.kernels import Routing
from smoe_hpc.kernels.padding import pad
from smoe_hpc.layers import balanced_quantile

Call = Callable[[], Any]
_BOTH = ("forward", "backward")
_TOLERANCE, _DAMPING_TOLERANCE, _DAMPING = 1e-5, 1e-3, 0.05


@dataclass(frozen=True)
class Inputs:
    """What every way of computing a layer is given.

    Args:
        shape: sizes.
        x: [B, C, H, W], channels last in memory, a leaf that wants a gradient.
        grad: [B, K F, H, W], channels last, the gradient at the output.
        values: [N, H, W] float32, of the gate.
        routing: the choice from them, ordered by number.
        padding: "zeros", "periodic_longitude" or "sphere".
    """

    shape: Shape
    x: Tensor
    grad: Tensor
    values: Tensor
    routing: Routing
    padding: str


def convolve(x: Tensor, weight: Tensor, padding: str) -> Tensor:
    """A plain convolution of a map [B, C, H, W] with filters [O, C, k, k], with any of our paddings."""
    if padding == "zeros":
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return F.conv2d(pad(x, weight.shape[-1], padding), weight)


def random_filters(inputs: Inputs, count: int) -> Tensor:
    """Random filters [count, C, k, k] as a leaf of the input's dtype, channels last."""
    size, fan_in = inputs.shape.kernel_size, inputs.shape.channels * inputs.shape.kernel_size**2
    made = torch.randn(count, inputs.shape.channels, size, size, device=inputs.x.device) / fan_in**0.5
    return made.to(inputs.x.dtype).to(memory_format=torch.channels_last).requires_grad_()


def _calls(part: str, apply: Callable[..., Tensor], inputs: Inputs, weight: Tensor, *more: Tensor) -> Call:
    """Forward without a graph, or with both gradients."""

    def forward() -> Tensor:
        with torch.no_grad():
            return apply(inputs.x, weight, *more)

    def backward() -> Any:
        y = apply(inputs.x, weight, *more)
        return y, torch.autograd.grad(y, (inputs.x, weight), inputs.grad)

    return {"forward": forward, "backward": backward}[part]


def plain(part: str, inputs: Inputs) -> Call | None:
    """A convolution with K F outputs."""
    if part not in _BOTH:
        return None
    weight = random_filters(inputs, inputs.shape.out_channels)
    return _calls(part, lambda x, weight: convolve(x, weight, inputs.padding), inputs, weight)


def conv_gather(part: str, inputs: Inputs, *, last: bool = False, compiled: bool = False) -> Call | None:
    """A convolution with all experts, channels last, and a gather: along dimension 1 as it is usually written, or (``last``)
    along the channels as the last dimension, where they lie next to each other in memory.
    """
    if part not in _BOTH:
        return None
    indices = inputs.routing.indices
    index = (indices.permute(1, 2, 0) if last else indices)[None].contiguous()
    apply = (_compiled_dense if compiled else _dense)(inputs.shape.filters, inputs.padding, last, inputs.shape)
    weight = random_filters(inputs, inputs.shape.num_experts * inputs.shape.filters)
    return _calls(part, apply, inputs, weight, index)


def _dense(filters: int, padding: str, last: bool, _: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    dim = 3 if last else 1

    def apply(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        every = convolve(x, weight, padding)
        every = every.permute(0, 2, 3, 1) if last else every
        index = index.expand(len(x), -1, -1, -1)
        if filters == 1:
            chosen = every.gather(dim, index)
        else:
            sizes = [-1] * 5
            sizes[dim + 1] = filters
            chosen = every.unflatten(dim, (-1, filters)).gather(dim, index.unsqueeze(dim + 1).expand(sizes))
            chosen = chosen.flatten(dim, dim + 1)
        return chosen.permute(0, 3, 1, 2) if last else chosen

    return apply


@functools.lru_cache(maxsize=1)
def _compiled_dense(filters: int, padding: str, last: bool, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled again for each shape, so that no call pays for guards of other shapes."""
    torch.compiler.reset()
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):  # its default is a name below /tmp that others can guess
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_folder("inductor"))
    return torch.compile(_dense(filters, padding, last, shape), dynamic=False, fullgraph=True)


def published(part: str, inputs: Inputs) -> Call | None:
    """The layer as its authors wrote it, in our words; its convolution in the input's dtype, its gate in float32."""
    shape = inputs.shape
    weight = random_filters(inputs, shape.num_experts * shape.filters).detach().contiguous().requires_grad_()
    logits = inputs.values.detach().clone().requires_grad_()
    x, grad = (t.detach().contiguous() for t in (inputs.x, inputs.grad))
    x.requires_grad_()
    quantile = balanced_quantile(shape.num_experts, shape.selected)

    def apply(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        copied = logits.detach().expand(len(x), -1, -1, -1).contiguous()
        indices = copied.topk(shape.selected, dim=1).indices
        every = convolve(x, weight, inputs.padding).unflatten(1, (-1, shape.filters))
        chosen = indices.unsqueeze(2).expand(-1, -1, shape.filters, -1, -1)
        return every.gather(1, chosen).flatten(1, 2), indices

    def step() -> Any:
        y, indices = apply(x, weight)
        seen: list[Tensor] = []

        def damp(at_output: Tensor) -> Tensor:
            error = at_output.float().abs().unflatten(1, (-1, shape.filters)).mean(2) * (at_output.numel() / 2)
            limit = _sorted_quantile(error, quantile)[:, None, None, None]
            seen.append(error <= limit + _TOLERANCE)
            factor = torch.where(error > limit + _DAMPING_TOLERANCE, _DAMPING, 1.0).to(at_output.dtype)
            return at_output * factor.repeat_interleave(shape.filters, 1)

        y.register_hook(damp)
        first = torch.autograd.grad(y, (x, weight), grad)
        correct = seen[0].float()
        wrong = (shape.selected - correct.sum(1, keepdim=True)) / (shape.num_experts - shape.selected)
        labels = wrong.expand(-1, shape.num_experts, -1, -1).clone().scatter_(1, indices, correct)
        loss = F.binary_cross_entropy_with_logits(logits.expand_as(labels), labels)
        return y, first, torch.autograd.grad(loss, logits)

    if part == "step":
        return step if shape.learns_routing else None
    own = replace(inputs, x=x, grad=grad)
    return _calls(part, lambda x, weight: apply(x, weight)[0], own, weight)


def _sorted_quantile(error: Tensor, quantile: float) -> Tensor:
    """Each sample's quantile [B] of errors [B, K, H, W], by sorting: torch.quantile takes no more than 16 million entries."""
    ordered = error.flatten(1).sort(1).values
    position = quantile * (ordered.shape[1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)


@contextlib.contextmanager
def quiet_compiler(path: Path) -> Iterator[None]:
    """Everything that torch.compile and the processes it starts say goes to a file, which is added to."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, stream)
                os.close(descriptor)
