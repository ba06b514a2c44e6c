"""Parameters that are spread over processes (FSDP), read whole where they are needed outside a forward.

``fully_shard`` makes a DTensor of each parameter; ``FullyShardedDataParallel`` cuts them as one flat tensor, and shows them
whole only inside ``summon_full_params``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from smoe_hpc.compat import is_flattened


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor (collective if it is a DTensor)."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def call_whole(module: nn.Module, *arguments: Any) -> Any:
    """``module(*arguments)`` with whole parameters (collective where some are DTensors)."""
    shards = {name: p for name, p in module.named_parameters() if hasattr(p, "full_tensor")}
    if not shards:
        return module(*arguments)
    return functional_call(module, {name: whole_tensor(p) for name, p in shards.items()}, arguments)


@contextlib.contextmanager
def summoned(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """While it lasts these modules of the model have whole parameters, where FullyShardedDataParallel has cut them.

    Collective over the processes that share the parameters.
    """
    flat = _flat_wrapper()
    with contextlib.ExitStack() as stack:
        if flat is not None:
            for wrapper in _wrappers_of(model, {id(module) for module in modules}, flat):
                stack.enter_context(flat.summon_full_params(wrapper, recurse=False, writeback=False))
        yield


def freed(module: nn.Module) -> bool:
    """Whether FullyShardedDataParallel has left a module's own parameters without memory until the next forward."""
    return any(isinstance(t, Tensor) and t.numel() and not t.untyped_storage().size() for t in vars(module).values())


def hides_parameters(model: nn.Module) -> bool:
    """Whether parameters have been replaced by a flat one, in which they cannot be told apart."""
    flat = _flat_wrapper()
    return flat is not None and any(isinstance(m, flat) and is_flattened(m) for m in model.modules())


def _flat_wrapper() -> Any:
    """The class FullyShardedDataParallel, if it has been imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)


def _wrappers_of(model: nn.Module, wanted: set[int], flat: Any) -> list[nn.Module]:
    """The nearest wrapper around each of the wanted modules, each once."""
    found: dict[int, nn.Module] = {}

    def walk(module: nn.Module, nearest: nn.Module | None) -> None:
        if isinstance(module, flat):
            nearest = module
        if id(module) in wanted and nearest is not None:
            found[id(nearest)] = nearest
        for child in module.children():
            walk(child, nearest)

    walk(model, None)
    return list(found.values())
