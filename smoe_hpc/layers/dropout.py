"""Dropout whose mask is a function of (seed, layer, step, sample, element) and of nothing else.

A library's dropout draws from a generator, so its mask depends on the device, on how processes share the batch and on
whether a forward is recomputed. Here each decision is a hash. It is computed in two parts to be cheap: the element's
number, mixed once and kept; and, for each sample of a step, an odd factor and an offset. An element is dropped where
factor * mixed + offset, taken as a 32-bit integer, lies below the threshold: a multiply-add hash, whose decisions are
uniform and pairwise independent up to 2^-30 or so. All arithmetic wraps around, alike on CPU and GPU.

Dimensions: B batch, C channels, H latitude rows, W longitude columns, L dropout layers.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.layers.moving import Move

_MIX_1, _MIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as signed numbers
_STEP_STRIDE = -0x61C8864680B583EB


class CounterDropout(nn.Module):
    """Set a share ``p`` of the values to zero while training and scale the others up; see the head of this file.

    :func:`smoe_hpc.layers.begin_step` must say before each forward which step and samples it is for.

    Args:
        p: share that is dropped, in [0, 1).
        seed: of the training.
        layer: number of this layer among those of the model; two of the same number and seed drop alike.

    Raises:
        ConfigError: a share out of range.
    """

    key: Tensor

    def __init__(self, p: float = 0.1, seed: int = 0, layer: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"p={p} of CounterDropout must lie in 0 to below 1, e.g. 0.1")
        self.p = p
        digest = hashlib.blake2b(f"{seed},{layer}".encode(), digest_size=8).digest()
        self._number = int.from_bytes(digest, "little", signed=True)
        self.register_buffer("key", torch.tensor(self._number), persistent=False)
        self.step: int | None = None
        self.hashes: Tensor | None = None

    def reset_parameters(self) -> None:
        """Write the key again; it is no parameter, but deferred initialisation calls this on every module with memory."""
        self.key = torch.full((), self._number, dtype=torch.int64, device=self.key.device)

    def leave_meta(self, device: torch.device) -> None:
        """Write down the key on a device, where it is on the meta device still: ``load_state_dict(..., assign=True)`` leaves
        what is not in the dict.
        """
        if self.key.is_meta and device.type != "meta":
            self.key = torch.full((), self._number, dtype=torch.int64, device=device)

    def _apply(self, fn: Move, recurse: bool = True) -> CounterDropout:
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape.

        Raises:
            SmoeError: while training, where no step was begun, or one with another number of samples.
        """
        if not self.training or self.p == 0:
            return x
        hashes = self.hashes  # a compiled forward reads nothing else that changes from step to step
        if hashes is None:
            if self.step is None:
                raise SmoeError(
                    "CounterDropout does not know the step and would drop the same values for ever; call "
                    "smoe_hpc.layers.begin_step(model, step, samples) before each forward, or model.eval()"
                )
            self.leave_meta(x.device)
            hashes = sample_hashes(self.key[None], self.step, torch.arange(len(x), device=x.device))[0]
        if len(hashes) != len(x):
            raise SmoeError(
                f"CounterDropout was given {len(x)} samples but begin_step told it of {len(hashes)}; give begin_step the "
                "positions of this forward's samples in the global batch"
            )
        return torch.where(self.kept(x, hashes), x * (1.0 / (1.0 - self.p)), 0.0)

    def kept(self, x: Tensor, hashes: Tensor) -> Tensor:
        """[B, C, H, W] bool: what is not dropped of ``x``, for samples of these ``hashes`` [B] int64."""
        factor = ((hashes >> 32).int() | 1).view(-1, 1, 1, 1)
        offset = hashes.int().view(-1, 1, 1, 1)
        channels, height, width = x.shape[1:]
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        make = mixed_elements if torch.compiler.is_compiling() else _kept_elements  # fused, it costs nothing to make again
        mixed = make(channels, height, width, x.device, last)
        threshold = min(round(self.p * 2**32) - 2**31, 2**31 - 1)
        return torch.addcmul(offset, mixed, factor) >= threshold

    def extra_repr(self) -> str:
        """Arguments as ``print(model)`` shows them."""
        return f"p={self.p}"


def mixed_elements(channels: int, height: int, width: int, device: torch.device, channels_last: bool) -> Tensor:
    """[1, C, H, W] int32: a mixed number for each element of a sample, in the memory format of what it is used for."""
    with torch.inference_mode(False), torch.no_grad():
        numbers = torch.arange(channels * height * width, device=device)
        mixed = (_mix(numbers * _STEP_STRIDE) >> 32).int().view(1, channels, height, width)
        return mixed.contiguous(memory_format=torch.channels_last) if channels_last else mixed


_kept_elements = functools.lru_cache(maxsize=8)(mixed_elements)


def sample_hashes(keys: Tensor, step: int, samples: Tensor) -> Tensor:
    """[L, B] int64: a hash for each layer of ``keys`` [L] int64 and each sample at ``samples`` [B] int64 in step's batch."""
    # Two rounds: neither equal sums of step and position nor equal differences of keys meet.
    of_step = _mix(keys + step * _STEP_STRIDE % 2**62)
    return _mix(_mix(of_step[:, None] ^ samples * _STEP_STRIDE) + of_step[:, None])


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64, shifts made logical."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


def begin_dropout(model: nn.Module, step: int, samples: Tensor | None = None) -> None:
    """Tell the dropout layers of a model which step and samples come next; all their hashes at once.

    Args:
        model: any network.
        step: number of the step, from 0.
        samples: [B] int64, positions in the step's global batch; None: 0, 1, 2, ... of what comes.
    """
    layers = [module for module in model.modules() if isinstance(module, CounterDropout)]
    if not layers:
        return
    hashes = None
    anchor = next(model.parameters(), None)
    for layer in layers:
        if anchor is not None:
            layer.leave_meta(anchor.device)
    if samples is not None:
        keys = torch.stack([layer.key for layer in layers])
        hashes = sample_hashes(keys, step, samples.to(keys.device))
    for number, layer in enumerate(layers):
        layer.step, layer.hashes = step, None if hashes is None else hashes[number]
