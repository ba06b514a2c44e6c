"""Many one-layer SMoEs side by side: how routing settles, over many settings at once.

The heat experiment needs one layer 1 -> 1 channel with K = 1. Its members here differ in quantile, learning rates, damping,
error scale and start, see the same batches and train together, as one batched computation on whatever device there is: a
hundred settings take the time of one. Each member computes what :class:`smoe_hpc.layers.SpatialMoE2d` computes (a test
holds one against the other); nothing here is used to train anything else.

Dimensions: S settings, B batch, P pixels, N experts, T = 9 filter taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_hpc.layers.groups import GATE_EPS

_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Setting:
    """What one member of the ensemble trains with; names as in a recipe.

    Args:
        quantile: of the routing loss, and of damping.
        gate_lr, lr: learning rates of the gate and of the experts.
        damping: factor for the gradient of wrong selections; 1 for none.
        error_scale: "none" or "running_mean".
        seed: of weights and gate.
    """

    quantile: float
    gate_lr: float
    lr: float = 1e-3
    damping: float = 0.0
    error_scale: str = "none"
    seed: int = 0


class _Adam:
    """Adam over parameters whose first dimension is the setting, each with a learning rate of its own."""

    def __init__(self, parameter: Tensor, lr: Tensor, eps: float) -> None:
        self.parameter, self.eps = parameter, eps
        self.lr = lr.view(-1, *[1] * (parameter.dim() - 1))
        self.mean, self.square, self.steps = torch.zeros_like(parameter), torch.zeros_like(parameter), 0

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(grad, 1 - _BETAS[0])
        self.square.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
        root = (self.square / (1 - _BETAS[1] ** self.steps)).sqrt_().add_(self.eps)
        self.parameter.sub_(self.lr * (self.mean / (1 - _BETAS[0] ** self.steps)) / root)


class Ensemble:
    """S one-layer SMoEs with K = F = C = 1 and zero padding.

    Args:
        settings: of the members.
        num_experts: N.
        grid: (H, W).
        device: where it computes.
    """

    def __init__(
        self, settings: list[Setting], num_experts: int, grid: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.settings, self.num_experts, self.grid = settings, num_experts, grid
        pixels = grid[0] * grid[1]
        weights, logits = [], []
        for setting in settings:
            generator = torch.Generator().manual_seed(setting.seed)
            weights.append((2 * torch.rand(num_experts, 9, generator=generator) - 1) / 3)
            logits.append((2 * torch.rand(num_experts, pixels, generator=generator) - 1) * (3 * num_experts) ** 0.5)
        self.weights = torch.stack(weights).to(device)  # [S, N, T]
        self.logits = torch.stack(logits).to(device)  # [S, N, P]

        def of_each(name: str) -> Tensor:
            return torch.tensor([getattr(setting, name) for setting in settings], dtype=torch.float32, device=device)

        self.quantile, self.damping = of_each("quantile"), of_each("damping")
        running = [setting.error_scale == "running_mean" for setting in settings]
        self.running = torch.tensor(running, device=device)
        self.running_error = torch.zeros(len(settings), pixels, device=device)
        self.steps = 0
        self.changed = torch.zeros(len(settings), device=device)
        self.optimizers = (
            _Adam(self.weights, of_each("lr"), 1e-8),
            _Adam(self.logits, of_each("gate_lr"), GATE_EPS),
        )
        self.indices = self.logits.argmax(1)  # [S, P]

    def forward(self, patches: Tensor) -> Tensor:
        """[B, T, P] -> [S, B, P]."""
        chosen = self.indices[:, None].expand(-1, 9, -1)
        filters = self.weights.transpose(1, 2).gather(2, chosen)  # [S, T, P]
        return torch.einsum("btp,stp->sbp", patches, filters)

    def train_step(self, patches: Tensor, target: Tensor) -> Tensor:
        """One step on a batch; patches [B, T, P], target [B, P]; returns each member's loss [S]."""
        difference = self.forward(patches) - target
        batch, pixels = target.shape
        errors = difference.abs()
        divisor = torch.ones_like(self.running_error)
        if self.steps:
            tiny = torch.finfo(torch.float32).tiny
            divisor = torch.where(self.running[:, None], self.running_error.clamp_min(tiny), divisor)
        scaled = errors / divisor[:, None]
        threshold = self._quantiles(scaled)
        correct = (scaled <= threshold + 1e-5).sum(1).float()  # [S, P]
        wrong = scaled > threshold + 1e-3
        grad = difference * (2.0 / difference[0].numel())
        grad = torch.where(wrong, grad * self.damping[:, None, None], grad)
        per_pixel = torch.einsum("sbp,btp->stp", grad, patches)
        chosen = self.indices[:, None].expand(-1, 9, -1)
        grad_weights = torch.zeros_like(self.weights).transpose(1, 2).contiguous()
        grad_weights.scatter_add_(2, chosen, per_pixel)
        labels = ((batch - correct) / (self.num_experts - 1))[:, None].expand_as(self.logits)
        labels = labels.scatter(1, self.indices[:, None], correct[:, None])
        grad_logits = (batch * self.logits.sigmoid() - labels) / (batch * self.num_experts * pixels)
        self.steps += 1
        keep = min(1.0 - 1.0 / self.steps, 0.99)
        self.running_error.lerp_(errors.mean(1), 1.0 - keep)
        for optimizer, gradient in zip(self.optimizers, (grad_weights.transpose(1, 2), grad_logits), strict=True):
            optimizer.step(gradient)
        before, self.indices = self.indices, self.logits.argmax(1)
        self.changed += (before != self.indices).float().mean(1)
        return difference.square().mean((1, 2))

    def _quantiles(self, scaled: Tensor) -> Tensor:
        """[S, B, 1]: each member's own quantile of each sample's errors [S, B, P]."""
        ordered = scaled.sort(-1).values
        position = self.quantile * (scaled.shape[-1] - 1)
        below = position.floor().long()
        share = (position - below)[:, None, None]
        take = below[:, None, None].expand(-1, scaled.shape[1], 1)
        low = ordered.gather(-1, take)
        high = ordered.gather(-1, (take + 1).clamp(max=scaled.shape[-1] - 1))
        return torch.lerp(low, high, share)

    def agreement(self, regions: Tensor) -> Tensor:
        """Share of pixels whose expert is the one of their region, best matching of experts to regions: [S] on the CPU.

        Args:
            regions: [P] integers in 0..N-1.
        """
        from scipy.optimize import linear_sum_assignment

        shares = []
        for indices in self.indices.cpu():
            joint = torch.zeros(self.num_experts, self.num_experts)
            joint.index_put_((indices, regions.cpu()), torch.ones(len(indices)), accumulate=True)
            rows, columns = linear_sum_assignment(joint.numpy(), maximize=True)
            shares.append(joint[rows, columns].sum() / len(indices))
        return torch.stack(shares)


def patches_of(fields: Tensor) -> Tensor:
    """[B, H, W] -> [B, T, P]: what a 3 x 3 filter sees at each pixel, zero outside the grid."""
    return F.unfold(fields[:, None], 3, padding=1)
