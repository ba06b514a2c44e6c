"""One optimiser step on every rank: DeepSpeed's engine around the model, and what it does not do.

DeepSpeed averages gradients over ranks, partitions optimiser state and gradients (ZeRO 1 and 2), accumulates and
casts. This file does the rest:

* Clipping. Gates must not be clipped, nor count in the norm; DeepSpeed knows one norm of all groups. So its own
  clipping is off, and gradients are clipped between its backward and its step: whole ones at stage 0, this rank's
  partition at stages 1 and 2.
* float64. DeepSpeed reduces half and single precision alone, and ZeRO's master weights are float32. So gradients are
  averaged here, and only stage 0 takes float64.
* One process. There is nothing to average or to partition: stage 0 runs, and its all-reduce of one is left out.
* Cost. A small model's step takes 2 to 3 ms; DeepSpeed's timers, gradient norm and forward wrapper would add 0.8 ms.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smoe_hpc import compat
from smoe_hpc.config import Recipe, check_world
from smoe_hpc.launch import rendezvous
from smoe_hpc.training.optimizers import make_optimizer, state_names, state_of_step
from smoe_hpc.training.processes import Processes

_BUCKET = 50_000_000  # elements reduced at a time: enough to fill a link, 200 MB of float32


class Engine:
    """A model that learns on every rank alike.

    Args:
        model: with equal parameters on every rank; moved to the processes' device and, for float64, converted.
        recipe: optimiser, precision, ZeRO stage, accumulation, global batch.
        processes: the ranks; construction is collective over them.

    Raises:
        ConfigError: a batch that the ranks cannot share equally.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, processes: Processes) -> None:
        training = recipe.training
        check_world(recipe, processes.world)
        self.dtype = torch.float64 if training.precision == "float64" else torch.float32
        self.stage = training.zero_stage if processes.world > 1 else 0
        assert not (self.stage and self.dtype == torch.float64)  # refused by the recipe
        self.model = model.to(processes.device, self.dtype)
        self._processes = processes
        self._autocast = training.precision == "bf16"
        self._clip = recipe.optimizer.clip
        self._optimizer = make_optimizer(self.model, recipe.optimizer)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._names = {p: name for name, p in self.model.named_parameters()}
        self._clipped = [group["clip"] for group in self._optimizer.param_groups]
        self._clipped_parameters = [p for g in self._optimizer.param_groups if g["clip"] for p in g["params"]]
        self._base_lrs = [group["lr"] for group in self._optimizer.param_groups]
        with processes.at("broadcast (parameters)"):
            self._engine = _initialize(self.model, self._optimizer, recipe, self.stage, processes)
        rendezvous.same_time_out()  # DeepSpeed makes groups of its own
        self._averages = processes.world > 1 and self.dtype == torch.float64
        if processes.world == 1 or self._averages:
            compat.reduce_nothing_in_backward(self._engine)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Output of the model, in the precision of its parameters (bf16 autocast is undone, losses are float32)."""
        if self.stage:
            output: Tensor = self._engine(inputs)  # ZeRO readies its hooks here; it casts too
        else:
            with self._cast():
                output = self.model(inputs)
        return output.to(self.dtype)

    def predict(self, inputs: Tensor) -> Tensor:
        """Output of the model as it stands, without gradients."""
        with torch.no_grad(), self._cast():
            output: Tensor = self.model(inputs)
        return output.to(self.dtype)

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(self._processes.device.type, dtype=torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch; the last of a step reduces them over ranks (collective)."""
        with self._processes.at("all_reduce (gradients)"):
            self._engine.backward(loss)

    def step(self) -> None:
        """End a micro-batch; the last of a step clips gradients and moves the parameters (collective)."""
        with self._processes.at("all_gather (parameters)" if self.stage else "all_reduce (gradients)"):
            self._step()

    def _step(self) -> None:
        if self._engine.is_gradient_accumulation_boundary():
            if self._processes.world == 1:
                # other worlds give an unused parameter a zero gradient, which decays it; so must one process
                for parameter in self._parameters:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            elif self._averages:
                self._average_gradients()
            if self._clip is not None:
                self._clip_gradients(self._clip)
        self._engine.step()

    def _average_gradients(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = compat.flattened(gradients)
        dist.all_reduce(flat)
        flat /= self._processes.world
        for parameter, mean in zip(self._parameters, compat.unflattened(flat, gradients), strict=True):
            parameter.grad = mean

    def _clip_gradients(self, largest: float) -> None:
        """Scale the gradients of all groups but the gates so that their joint norm is at most ``largest``."""
        if self.stage == 0:
            nn.utils.clip_grad_norm_(self._clipped_parameters, largest)
            return
        averaged = compat.averaged_gradients(self._engine)
        parts = [part for group, clipped in enumerate(self._clipped) if clipped for part in averaged[group] or []]
        square = torch.zeros((), device=self._processes.device)
        for norm in compat.norms(parts) if parts else ():
            square += norm.float() ** 2
        dist.all_reduce(square)
        scale = (largest / (square.sqrt() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_, without asking the device
        if parts:
            compat.scale_(parts, scale)

    def scale_learning_rates(self, scale: float) -> None:
        """Set every group's learning rate to ``scale`` times the recipe's."""
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * scale

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group by its name."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole state tensors by ``<state>.<parameter>`` (collective with ZeRO; after at least one step)."""
        names = state_names(self._optimizer)
        if not self.stage:
            return {f"{name}.{self._names[p]}": self._optimizer.state[p][name] for p in self._parameters for name in names}
        from deepspeed.utils import safe_get_full_optimizer_state

        compat.link_optimizer_states(self._engine)
        return {f"{name}.{self._names[p]}": safe_get_full_optimizer_state(p, name) for p in self._parameters for name in names}

    def load_optimizer_state(self, state: dict[str, Tensor], step: int) -> None:
        """Load what `optimizer_state` gave after ``step`` steps, at any world size and stage."""
        names = state_names(self._optimizer)
        if not self.stage:
            for p in self._parameters:
                own = {name: state[f"{name}.{self._names[p]}"] for name in names}
                self._optimizer.state[p] = state_of_step(self._optimizer, p, step, own)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        for group in self._optimizer.param_groups:
            for flat in group["params"]:  # by now one flat partition a group
                empty = {name: torch.zeros_like(flat) for name in names}
                self._optimizer.state[flat] = state_of_step(self._optimizer, flat, step, empty)
        compat.link_optimizer_states(self._engine)
        for p in self._parameters:
            for name in names:
                whole = state[f"{name}.{self._names[p]}"].to(p)
                safe_set_full_optimizer_state(p, whole, name)

    def weights_changed(self) -> None:
        """Call this after parameters were written from outside: ZeRO renews its master copy."""
        if self.stage:
            compat.renew_master_weights(self._engine)


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, stage: int, processes: Processes) -> Any:
    import deepspeed  # seconds to import: only where training happens

    # ZeRO still calls what torch is about to rename, and says so at every step
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes up torch's group if that runs already
    training = recipe.training
    elements = sum(p.numel() for p in model.parameters())
    bucket = min(_BUCKET, elements + elements % 2)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "compute_grad_norm": False,
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.batch // (processes.world * training.accumulation),
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # SGD; tests hold it against a written-out loop
    }
    if training.precision == "bf16":
        # no module's gradients are reduced in bf16: they are float32, and so is their sum over ranks
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
