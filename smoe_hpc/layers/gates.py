"""Gates: what a pixel's choice of experts is read from.

A gate gives *values*, one per expert and pixel; the K highest are selected. "Tensor routing", the gate that the paper
settles on, learns the values themselves (:class:`LatentGate`); others compute them from the input
(:mod:`smoe_hpc.layers.input_gates`); a fixed map of regions serves as an oracle (:class:`FixedGate`).

From the raw values the options follow in the published order: noise (training only), absolute value, softmax. Parameters
of a gate stay in float32 whatever the model is cast to, and are computed with outside autocast: bfloat16 cannot tell most
of the values apart.

A gate may be shared by layers of equal N, K and grid; its gradient is then the mean of theirs. Where the choice does not
depend on the input it is *state*: :func:`smoe_hpc.layers.end_step` renews it after an optimiser step, and until the next
one every forward uses it. Without that call a gate selects anew in each forward.

Dimensions: B batch, C input channels, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import Routing, select_experts
from smoe_hpc.layers.auxiliary import AuxiliaryLosses, importance_loss, load_loss, spatial_agreement_loss
from smoe_hpc.layers.noise import NOISES, gate_noise


class Gate(nn.Module):
    """What all gates share: options, noise, selection, the choice as state.

    Args:
        num_experts: N.
        selected: K, experts selected at each pixel.
        grid: (H, W).
        softmax: values are normalised over the experts.
        absolute: values are replaced by their magnitude.
        noise: "none"; "shared", one draw a step for the whole batch; "per_sample". Standard deviation 1 / N, in training.
        noise_seed: of the noise.
        auxiliary: weights of the auxiliary losses.

    Raises:
        ConfigError: sizes or options that cannot be.
    """

    depends_on_input = False

    def __init__(
        self,
        num_experts: int,
        selected: int,
        grid: tuple[int, int],
        *,
        softmax: bool = False,
        absolute: bool = False,
        noise: str = "none",
        noise_seed: int = 0,
        auxiliary: AuxiliaryLosses | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= selected <= num_experts:
            raise ConfigError(f"selected={selected} of num_experts={num_experts}: give a number from 1 to num_experts")
        if len(grid) != 2 or min(grid) < 1:
            raise ConfigError(f"grid={grid}: give (rows, columns), e.g. (32, 64)")
        if noise not in NOISES:
            raise ConfigError(f"gate noise={noise!r} is not known; choose one of {', '.join(NOISES)}")
        auxiliary = auxiliary or AuxiliaryLosses()
        if auxiliary.load and noise == "none":
            raise ConfigError("the load loss asks what other noise would select: set the gate's noise, or load=0")
        self.num_experts, self.selected, self.grid = num_experts, selected, (int(grid[0]), int(grid[1]))
        self.softmax, self.absolute = softmax, absolute
        self.noise, self.noise_seed, self.noise_std = noise, noise_seed, 1.0 / num_experts
        self.auxiliary = auxiliary
        self.layers_sharing = 0
        self.step = 0
        self.samples: Tensor | None = None
        self.held: dict[str, Routing] = {}
        self.waiting: dict[str, Routing] = {}
        self.before: Routing | None = None

    # -- values ------------------------------------------------------------------------------------------------------

    def raw_values(self, x: Tensor) -> Tensor:
        """Values before noise and options: [N, H, W], or [B, N, H, W] if they depend on the input x [B, C, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its values are")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values that routing is read from, and the weighted auxiliary loss (0-d, or None).

        Args:
            x: [B, C, H, W], the layer's input.

        Returns:
            [N, H, W], or [B, N, H, W] where samples have their own.
        """
        with torch.autocast(x.device.type, enabled=False):
            raw = self.raw_values(x)
            noisy = self._with_noise(raw, x.shape[0]) if self.training and self.noise != "none" else raw
            values = self._shaped(noisy)
            if not (self.training and self.auxiliary and torch.is_grad_enabled()):
                return values, None
            return values, self._auxiliary_loss(raw, noisy)

    def _shaped(self, values: Tensor) -> Tensor:
        if self.absolute:
            values = values.abs()
        return values.softmax(-3) if self.softmax else values

    def _with_noise(self, raw: Tensor, batch: int) -> Tensor:
        samples = self.samples
        if self.noise == "per_sample" and (samples is None or len(samples) != batch):
            samples = torch.arange(batch)
        noise = gate_noise((self.num_experts, *self.grid), self.noise, self.noise_seed, self.step, samples)
        return raw + self.noise_std * noise.to(raw.device, raw.dtype)

    def _auxiliary_loss(self, raw: Tensor, noisy: Tensor) -> Tensor:
        weights = self.auxiliary
        total = raw.new_zeros(())
        if weights.importance:
            total = total + weights.importance * importance_loss(raw.softmax(-3) if self.softmax else raw)
        if weights.load:
            total = total + weights.load * load_loss(raw, noisy, self.selected, self.noise_std)
        if weights.spatial_agreement:
            total = total + weights.spatial_agreement * spatial_agreement_loss(raw)
        return total / max(self.layers_sharing, 1)

    # -- choice ------------------------------------------------------------------------------------------------------

    @property
    def per_sample(self) -> bool:
        """Whether each sample of a training batch has its own choice of experts."""
        return self.depends_on_input or self.noise == "per_sample"

    def routing(self, values: Tensor, expert_order: str) -> Routing:
        """The choice for these values; in training the held one, if the training loop holds one."""
        held = self.held.get(expert_order) if self.training and not self.per_sample else None
        return held if held is not None else select_experts(values, self.selected, expert_order)

    def renew(self, expert_order: str, delay: int) -> None:
        """Select from the present parameters and hold the choice, at once (``delay`` 0) or from the next call on (1)."""
        anchor = next(self.parameters(), None)
        x = torch.empty(1, 1, *self.grid, device=None if anchor is None else anchor.device)
        with torch.no_grad():
            new = select_experts(self(x)[0], self.selected, expert_order)
        used = self.held.get(expert_order)
        if used is not None:
            self.before = self.waiting.get(expert_order, used)
        if delay and used is not None:
            self.held[expert_order] = self.waiting.get(expert_order, used)
            self.waiting[expert_order] = new
        else:
            self.held[expert_order] = new
            self.waiting.pop(expert_order, None)

    def changed(self) -> Tensor | None:
        """Share of selections (0-d) that the last renewal replaced; None before the second one."""
        for order, held in self.held.items():
            return None if self.before is None else self.waiting.get(order, held).changed_from(self.before)
        return None

    def release(self) -> None:
        """Hold no choice: select in every forward again."""
        self.held.clear()
        self.waiting.clear()
        self.before = None

    def collect(self, counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
        """Counts of correct selections [K, H, W] for the pixels whose values this process holds: here, all of them.

        A gate that is spread over processes by pixels sums the counts over them and keeps its own pixels.
        """
        return counts, indices, batch

    # -- float32 -----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        def keep_precision(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if tensor.is_floating_point() and new.dtype in (torch.float16, torch.bfloat16):
                new = tensor.to(new.device)
            return new

        for routings in (self.held, self.waiting):
            for order, routing in routings.items():
                device = fn(routing.choice[:0]).device  # a type is for parameters, not for numbers of experts
                routings[order] = Routing(routing.choice.to(device), routing.num_experts)
        self.before = None  # may lie on another device than what comes next
        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes and the options that are on."""
        options = [name for name in ("softmax", "absolute") if getattr(self, name)]
        options += [f"noise={self.noise}"] if self.noise != "none" else []
        return ", ".join([f"experts={self.num_experts}, selected={self.selected}, grid={self.grid}", *options])


class LatentGate(Gate):
    """Tensor routing: the values are a learned tensor, independent of the input (paper, section 3).

    Parameter ``logits`` [N, H, W], float32, starts uniform in (-b, b) with b = sqrt(3 N / K).
    """

    def __init__(
        self,
        num_experts: int,
        selected: int,
        grid: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, selected, grid, **options)
        bound = (3.0 * num_experts / selected) ** 0.5
        start = torch.rand(num_experts, *self.grid, generator=generator)
        self.logits = nn.Parameter((2.0 * start - 1.0) * bound)

    def raw_values(self, x: Tensor) -> Tensor:
        """The learned tensor [N, H, W]."""
        return self.logits


class FixedGate(Gate):
    """A given map of regions says which expert a pixel uses, as an oracle would; nothing is learned.

    Args:
        region_map: [H, W] integers in 0..N-1.

    Raises:
        ConfigError: more than one selected expert, or a map of another shape or of other numbers.
    """

    region_map: Tensor

    def __init__(
        self, num_experts: int, selected: int, grid: tuple[int, int], *, region_map: Tensor, **options: Any
    ) -> None:
        super().__init__(num_experts, selected, grid, **options)
        if selected != 1:
            raise ConfigError(f"a fixed gate names one expert a pixel, selected={selected}; set selected=1")
        region_map = check_region_map(region_map, self.grid).long()
        if int(region_map.min()) < 0 or int(region_map.max()) >= num_experts:
            raise ConfigError(
                f"region map holds {int(region_map.min())}..{int(region_map.max())}, num_experts={num_experts}: "
                "give numbers from 0 to num_experts - 1"
            )
        self.register_buffer("region_map", region_map)

    def raw_values(self, x: Tensor) -> Tensor:
        """One at the region's expert, zero elsewhere: [N, H, W]."""
        one_hot = torch.zeros(self.num_experts, *self.grid, device=self.region_map.device)
        return one_hot.scatter_(0, self.region_map[None], 1.0)


def check_region_map(region_map: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The map as a tensor [H, W] of this grid.

    Raises:
        ConfigError: no map, or one of another shape.
    """
    if region_map is None:
        raise ConfigError("this gate needs a region map [H, W]; the heat stores hold one, constants['region']")
    region_map = torch.as_tensor(region_map)
    if tuple(region_map.shape) != tuple(grid):
        raise ConfigError(f"region map is {tuple(region_map.shape)}, the grid {tuple(grid)}: give a map of the same grid")
    return region_map
