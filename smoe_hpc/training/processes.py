"""The processes of a run, and how they agree.

Every process of a run is a data-parallel rank. Besides the group that carries gradients (NCCL on GPUs, gloo on CPUs)
there is a *control* group on gloo: small decisions travel there, so that a decision on a GPU machine never waits for
a kernel. An error of one rank must reach all of them, or the others wait in a collective that never comes: `on_first`
and `together` carry errors across.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from smoe_hpc import errors
from smoe_hpc.launch import rendezvous
from smoe_hpc.launch.pulse import Pulse

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Who this process is among all of the run.

    Attributes:
        rank: 0 to world - 1.
        world: number of processes.
        device: where this process computes.
        control: gloo group for small decisions; None with one process.
        pulse: signs of life of all of them; None with one process, or where somebody else started the group.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None
    pulse: Pulse | None = None

    def at(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around a collective: its name, e.g. "all_reduce (gradients)", for error messages."""
        return contextlib.nullcontext() if self.pulse is None else self.pulse.at(what)

    def at_step(self, step: int) -> None:
        """Note the optimiser step that begins, counted from 1, for error messages."""
        if self.pulse is not None:
            self.pulse.step = step

    @property
    def first(self) -> bool:
        """True on rank 0, which alone writes files that all share."""
        return self.rank == 0

    def on_first(self, action: Callable[[], T]) -> T:
        """Result of ``action`` on rank 0, on every rank (collective); its error is raised on every rank."""
        if self.world == 1:
            return action()
        outcome: list[tuple[str, object]] = [("", None)]
        if self.first:
            try:
                outcome = [("", action())]
            except Exception as error:
                dist.broadcast_object_list([_named(error)], src=0, group=self.control)
                raise
        with self.at("broadcast (what rank 0 found)"):
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        kind, value = outcome[0]
        if kind:
            raise _error(kind, str(value))
        return value  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """Result of ``action``, which every rank runs (collective); if it fails on one rank, it fails on all.

        ``action`` itself must not stop in a collective when it fails on one rank only.
        """
        if self.world == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        outcomes: list[tuple[str, str]] = [("", "")] * self.world
        with self.at("all_gather (whether it went well)"):
            dist.all_gather_object(outcomes, _named(failure) if failure else ("", ""), group=self.control)
        if failure:
            raise failure
        for rank, (kind, message) in enumerate(outcomes):
            if kind:
                raise _error(kind, f"rank {rank}: {message}")
        return result

    def sum(self, value: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks (collective, in place)."""
        if self.world > 1:
            with self.at("all_reduce (sums)"):
                dist.all_reduce(value, group=self.control if value.device.type == "cpu" else None)


def _named(error: Exception) -> tuple[str, str]:
    """Name of an error's nearest class of ours (or RunError) and its message."""
    known = [cls.__name__ for cls in type(error).__mro__ if getattr(errors, cls.__name__, None) is cls]
    return (known[0], str(error)) if known else ("RunError", f"{type(error).__name__}: {error}")


def _error(kind: str, message: str) -> errors.SmoeError:
    cls: type[errors.SmoeError] = getattr(errors, kind)
    return cls(message)


def join() -> Processes:
    """This process's place in the run; joins the others first if that has not been done (collective).

    The device is the GPU numbered LOCAL_RANK where the processes speak NCCL, else the CPU.

    Raises:
        LaunchError: the processes were not started as their launcher says.
    """
    if not dist.is_initialized():
        rendezvous.init_distributed("cuda" if torch.cuda.is_available() else "cpu")
        atexit.register(rendezvous.shutdown)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even when there is one process
    device = torch.device("cpu")
    if "nccl" in str(dist.get_backend()):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    world = dist.get_world_size()
    control = _control_group(dist.group.WORLD) if world > 1 else None
    rendezvous.same_time_out()
    return Processes(rank=dist.get_rank(), world=world, device=device, control=control, pulse=rendezvous.own_pulse())


@functools.lru_cache(maxsize=1)
def _control_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One gloo group for each world, however many runs a process makes in it."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
