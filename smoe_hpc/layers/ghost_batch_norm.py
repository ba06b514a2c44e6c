"""Batch normalisation over groups of samples that do not depend on how processes share a batch ("ghost batches").

Plain batch normalisation takes its statistics over whatever a process happens to hold, so another number of processes,
or accumulation, is another model. Here they are taken over fixed groups of consecutive samples of the global batch
(Hoffer et al. 2017): as long as each micro-batch is whole groups, outputs and gradients are the same however the batch is
shared. The running statistics, too: they are renewed once an optimiser step, from all groups of all processes.

Dimensions: B batch, C channels, H latitude rows, W longitude columns, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.moving import Move, wide, widen

_FLOAT32 = ("running_mean", "running_var")


class GhostBatchNorm2d(nn.Module):
    """Normalise each channel over groups of ``group`` consecutive samples; [B, C, H, W] -> the same shape.

    Parameters ``weight`` and ``bias`` [C], buffers ``running_mean`` and ``running_var`` [C] (of unbiased variances, as
    torch has it) and ``renewals``, how often they were renewed. Call :func:`smoe_hpc.layers.end_step` after each optimiser
    step: it renews the buffers, which evaluation normalises by. Under autocast the input may be of half precision;
    parameters and statistics stay as they are. Running statistics stay in float32 whatever the layer is cast to.

    The running statistics are means over the steps so far, in which older ones fade; they do not start from 0 and 1. In a
    deep network what is left of such a start multiplies from layer to layer, and a model of some hundred steps would
    forecast nonsense. After many steps both are the same.

    Args:
        channels: C.
        group: samples that are normalised together; B must be a multiple of it while training.
        eps: added to the variance (Keras and Rasp and Thuerey 2021: 1e-3).
        momentum: share of a step's statistics in the running ones (Keras' momentum of 0.99 is 0.01).

    Raises:
        ConfigError: invalid sizes.
    """

    running_mean: Tensor
    running_var: Tensor
    renewals: Tensor

    def __init__(self, channels: int, group: int = 32, eps: float = 1e-3, momentum: float = 0.01) -> None:
        super().__init__()
        for name, value in {"channels": channels, "group": group}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} of GhostBatchNorm2d must be at least 1")
        self.channels, self.group, self.eps, self.momentum = channels, group, eps, momentum
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.register_buffer("renewals", torch.empty((), dtype=torch.int64))
        self._sums: Tensor | None = None
        self._groups = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget everything: the start values, and running statistics of no step."""
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.renewals):
            nn.init.zeros_(zeros)
        self._sums, self._groups = None, 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [B, C, H, W].

        Raises:
            ConfigError: while training, a batch that is not whole groups.
        """
        if not self.training:
            mean, variance = self.running_mean.to(self.weight.dtype), self.running_var.to(self.weight.dtype)
            return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        if len(x) % self.group or not len(x):
            raise ConfigError(
                f"GhostBatchNorm2d normalises groups of {self.group} samples but was given {len(x)}; give each process a "
                f"multiple of {self.group} samples, or make groups smaller"
            )
        parts = x.split(self.group)
        # With a momentum of 1 the kernel leaves a group's own statistics where it would keep running ones; it multiplies
        # what was there by 0, so that must be finite.
        means, variances = (self.weight.new_zeros(len(parts), self.channels) for _ in range(2))
        normal = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, mean, variance in zip(parts, means.unbind(), variances.unbind(), strict=True)
        ]
        self._remember(means, variances)
        return normal[0] if len(normal) == 1 else torch.cat(normal)

    def _remember(self, means: Tensor, variances: Tensor) -> None:
        """Sums [2 C] over the groups since the last step, float64, so that their order does not show. A forward that is
        made twice (recomputation) counts twice in the sum and in the number of groups, so not in their mean."""
        sums = torch.cat([means, variances], dim=1).sum(dim=0, dtype=torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums
        self._groups += len(means)

    def _apply(self, fn: Move, recurse: bool = True) -> GhostBatchNorm2d:
        before = {name: self._buffers[name] for name in _FLOAT32}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None
            assert new is not None
            self._buffers[name] = wide(old, new)
        if self._sums is not None:
            gone = self._sums.is_meta or self.weight.is_meta
            self._sums, self._groups = (None, 0) if gone else (self._sums.to(self.weight.device), self._groups)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        widen(state_dict, [prefix + name for name in _FLOAT32])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def take_sums(self) -> Tensor:
        """[2 C + 1] float64: sums of the groups' means and variances since the last call, and how many groups."""
        sums, groups = self._sums, self._groups
        self._sums, self._groups = None, 0
        if sums is None:
            sums = torch.zeros(2 * self.channels, dtype=torch.float64, device=self.running_mean.device)
        return torch.cat([sums, sums.new_full((1,), groups)])

    def renew(self, sums: Tensor) -> None:
        """Move the running statistics toward the mean of the groups in ``sums`` (see `take_sums`); nothing if none."""
        mean, variance, groups = sums.split([self.channels, self.channels, 1])
        self.renewals += (groups[0] > 0).long()
        # shares of 1, then about 1/2, 1/3, ... that fall towards the momentum
        share = self.momentum / (1.0 - (1.0 - self.momentum) ** self.renewals.clamp(min=1).double())
        for running, total in ((self.running_mean, mean), (self.running_var, variance)):
            new = torch.lerp(running.double(), total / groups.clamp(min=1.0), share)
            running.copy_(torch.where(groups > 0, new, running.double()))

    def __getstate__(self) -> dict[str, Any]:
        """Without the sums of a step that has not ended: a copy (or a pickle) starts afresh."""
        return {**self.__dict__, "_sums": None, "_groups": 0}

    def extra_repr(self) -> str:
        """Arguments as ``print(model)`` shows them."""
        return f"{self.channels}, group={self.group}, eps={self.eps}, momentum={self.momentum}"


def renew_running_statistics(model: nn.Module, group: Any = None) -> None:
    """Renew the running statistics of all ghost batch normalisations with one reduction. Collective over ``group``.

    Args:
        model: any network, the same on all processes.
        group: processes that share a batch; None: all, where torch.distributed runs.
    """
    layers = [module for module in model.modules() if isinstance(module, GhostBatchNorm2d)]
    if not layers:
        return
    with torch.no_grad():
        sums = torch.cat([layer.take_sums() for layer in layers])
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
        parts = sums.split([2 * layer.channels + 1 for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.renew(part)
