"""Gates: what a pixel's choice of experts is read from.

A gate gives *values*, one per expert and pixel; the K highest are selected. "Tensor routing", the gate that the paper
settles on, learns the values themselves (:class:`smoe_hpc.layers.LatentGate`); others compute them from the input
(:mod:`smoe_hpc.layers.gates.input_gates`); a fixed map of regions serves as an oracle (:class:`smoe_hpc.layers.FixedGate`).

From the raw values the options follow in the published order: noise (training only), absolute value, softmax. Parameters
of a gate stay in float32 whatever the model is cast to, and are computed with outside autocast: bfloat16 cannot tell most
of the values apart.

A gate may be shared by layers of equal N, K and grid; its gradient is then the mean of theirs. Where the choice does not
depend on the input it is *state*: :func:`smoe_hpc.layers.end_step` renews it after an optimiser step, and until the next
one every forward in training uses it. Without that call a gate selects again in each forward. A loop that stops calling it is
warned (:mod:`smoe_hpc.layers.gates.staleness`).

Dimensions: B batch, C input channels, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smoe_hpc.compat import version_of
from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.kernels import Routing, select_experts
from smoe_hpc.layers.gates.auxiliary import AuxiliaryLosses
from smoe_hpc.layers.gates.noise import NOISES, gate_noise
from smoe_hpc.layers.gates.sharing import Sharing
from smoe_hpc.layers.gates.staleness import Staleness
from smoe_hpc.layers.moving import Move, keeping_float32, may_look, widen, without_autocast
from smoe_hpc.layers.sharded import call_whole, freed
from smoe_hpc.layers.tracing import refuse_script

NOT_A_NUMBER = (
    "{gate} holds values that are not numbers, so that its choice means nothing: look for NaN in the inputs and the loss, or "
    "lower the gate's learning rate, and resume from earlier weights"
)


class Gate(nn.Module):
    """What all gates share: options, noise, selection, the choice as state.

    Args:
        num_experts: N.
        selected: K, experts selected at each pixel.
        grid: (H, W).
        softmax: values are normalised over the experts.
        absolute: values are replaced by their magnitude.
        noise: "none"; "shared", one draw a step for the whole batch; "per_sample". Standard deviation 1 / N, in training.
        noise_seed: of the noise; None: the gate's number in the model given to :func:`smoe_hpc.layers.begin_step`.
        auxiliary: weights of the auxiliary losses.

    Raises:
        ConfigError: invalid sizes or options.
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
        noise_seed: int | None = None,
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
        self.sharing = Sharing()
        self.step: int | None = None
        self.number = 0
        self._frozen = self._in_use = False
        self._staleness = Staleness()
        self.samples: Tensor | None = None
        self.held: dict[str, Routing] = {}
        self.waiting: dict[str, Routing] = {}
        self.before: Routing | None = None
        self._looked_at: list[tuple[int, int]] = []

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
        with without_autocast(x.device.type):
            raw = self.raw_values(x)
            noisy = self._with_noise(raw, x.shape[0]) if self.training and self.noise != "none" else raw
            values = self._shaped(noisy)
            if not (self.training and self.auxiliary and torch.is_grad_enabled()):
                return values, None
            shown = raw.softmax(-3) if self.softmax else raw
            return values, self.auxiliary.of(raw, noisy, shown, self.selected, self.noise_std)

    def _shaped(self, values: Tensor) -> Tensor:
        if self.absolute:
            values = values.abs()
        return values.softmax(-3) if self.softmax else values

    def _with_noise(self, raw: Tensor, batch: int) -> Tensor:
        if self.step is None:
            raise SmoeError(
                f"a gate with noise={self.noise!r} does not know the step and would draw the same numbers for ever; call "
                "smoe_hpc.layers.begin_step(model, step, samples) before each forward, or model.eval()"
            )
        samples, seed = self.samples, self.number if self.noise_seed is None else self.noise_seed
        if self.noise == "per_sample" and samples is None:
            samples = torch.arange(batch)
        if self.noise == "per_sample" and samples is not None and len(samples) != batch:
            raise SmoeError(
                f"a gate with noise='per_sample' was told of {len(samples)} samples but given {batch}: call "
                "smoe_hpc.layers.begin_step(model, step, samples) with the samples of this batch"
            )
        noise = gate_noise((self.num_experts, *self.grid), self.noise, seed, self.step, samples)
        return raw + self.noise_std * noise.to(raw.device, raw.dtype)

    def be_used(self, uses: bool) -> None:
        """A layer was made that has a use for the values, or none. Parameters that no layer uses are frozen: wrappers such as
        DistributedDataParallel wait for the gradient of every other one.
        """
        if uses:
            self._in_use = True
            if self._frozen:
                self.requires_grad_(True)
                self._frozen = False
        elif not self._in_use and not self.auxiliary and any(p.requires_grad for p in self.parameters()):
            self.requires_grad_(False)
            self._frozen = True

    # -- choice ------------------------------------------------------------------------------------------------------

    @property
    def per_sample(self) -> bool:
        """Whether each sample of a training batch has its own choice of experts."""
        return self.depends_on_input or self.noise == "per_sample"

    def routing(self, values: Tensor, expert_order: str) -> Routing:
        """The choice for these values; in training the held one, if the training loop holds one."""
        held = self.held.get(expert_order) if self.training and not self.per_sample else None
        if held is not None:
            return held
        if may_look(values) and (values.device.type == "cpu" or not self.training):
            self._refuse_nan()
        return select_experts(values, self.selected, expert_order)

    def _refuse_nan(self) -> None:
        """SmoeError if a parameter holds a NaN; each state of the parameters is checked once."""
        state = [(id(p), version_of(p)) for p in self.parameters()]
        if state == self._looked_at:
            return
        for parameter in self.parameters():
            if may_look(parameter) and parameter.sum().isnan() and parameter.isnan().any():
                raise SmoeError(NOT_A_NUMBER.format(gate=self.in_words()))
        self._looked_at = state

    def note_parameters(self) -> None:
        """The training loop has seen to the choice: what is held now belongs to the present parameters."""
        self._staleness.renewed(self)

    def look_whether_stale(self, layer: object) -> None:
        """Warn, once, of a held choice that was not renewed while the parameters changed; called in each forward of a layer,
        with an object that identifies the layer.
        """
        if self.held and not self.per_sample:
            self._staleness.look(self, layer)

    def train(self, mode: bool = True) -> Gate:
        """Switch to training or evaluation; parameters are checked again."""
        self._looked_at = []  # a fused optimiser may have written to them without a trace
        super().train(mode)
        return self

    def __prepare_scriptable__(self) -> None:
        refuse_script()

    def renew(self, expert_order: str, delay: int) -> None:
        """Select from the present parameters and hold the choice, at once (``delay`` 0) or from the next call on (1)."""
        self.note_parameters()
        anchor = next(self.parameters(), None)
        # Not in inference mode, whose tensors no backward could use.
        with torch.inference_mode(False), torch.no_grad():
            self._looked_at = []  # an optimiser may have written to parameters by a way that leaves no trace
            x = torch.empty(1, 1, *self.grid, device=None if anchor is None else anchor.device)
            new = select_experts(self._values_to_hold(x), self.selected, expert_order)
        used = self.held.get(expert_order)
        if used is not None:
            self.before = self.waiting.get(expert_order, used)
        if delay and used is not None:
            self.held[expert_order] = self.waiting.get(expert_order, used)
            self.waiting[expert_order] = new
        else:
            self.held[expert_order] = new
            self.waiting.pop(expert_order, None)

    def _values_to_hold(self, x: Tensor) -> Tensor:
        """Values [N, H, W] from whole parameters."""
        values: Tensor | None = None if freed(self) else call_whole(self, x)[0]
        if values is None or values.shape[-3:] != (self.num_experts, *self.grid):
            raise SmoeError(
                f"{self.in_words()} holds a part of its parameters only: give end_step and hold_routing the model that "
                "FullyShardedDataParallel has returned, not what is inside it"
            )
        if values.device.type == "cpu" and values.sum().isnan() and values.isnan().any():  # a GPU would be waited for
            raise SmoeError(NOT_A_NUMBER.format(gate=self.in_words()))
        return values

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

    def _apply(self, fn: Move, recurse: bool = True) -> Gate:
        for routings in (self.held, self.waiting):
            for order, routing in list(routings.items()):
                device = fn(routing.choice[:0]).device  # a type is for parameters, not for numbers of experts
                if routing.choice.is_meta and device.type != "meta":
                    del routings[order]  # it holds nothing, and the parameters it came from do not either
                else:
                    routings[order] = Routing(routing.choice.to(device), routing.num_experts)
        self.before = None  # may lie on another device than what comes next
        super()._apply(keeping_float32(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.release()
        widen(state_dict, [name for name in state_dict if name.startswith(prefix)])  # the parts' entries are among them
        super()._load_from_state_dict(state_dict, prefix, *args)

    def in_words(self) -> str:
        """Kind and sizes, in a line."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Sizes and the options that are on."""
        options = [name for name in ("softmax", "absolute") if getattr(self, name)]
        options += [f"noise={self.noise}"] if self.noise != "none" else []
        return ", ".join([f"experts={self.num_experts}, selected={self.selected}, grid={self.grid}", *options])
