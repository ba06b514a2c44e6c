"""Names of other libraries that those keep to themselves, and that we need all the same.

Each has a function here that says what we do with it, and nowhere else is it touched. setup.cfg bounds the versions from
above that the tests have run against: a new release is tried with them first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.autograd import Function

# -- torch: autograd, dispatch, modules -----------------------------------------------------------------------------------


def current_backward() -> int:
    """The number of the backward pass that this thread is in, which no other pass has; -1 outside of one."""
    import torch

    return torch._C._current_graph_task_id()


def backward_keeps_graph() -> bool:
    """Whether the backward pass that this thread is in keeps its graph (``retain_graph``, ``create_graph``)."""
    import torch

    return torch._C._autograd._get_current_graph_task_keep_graph()


def node_class(function: type[Function]) -> type:
    """The class of the nodes that an autograd.Function leaves in the graph."""
    return function._backward_cls


def node_number(node: Any) -> int:
    """A number of a node of autograd's graph, which is higher the later it was made."""
    return node._sequence_nr()


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to, as far as autograd knows; -1 for one of inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def dispatch_mode_active() -> bool:
    """Whether a mode such as FakeTensorMode sees all operations."""
    import torch

    return torch._C._len_torch_dispatch_stack() > 0


def is_zero_without_memory(tensor: Tensor) -> bool:
    """Whether a tensor stands for zeros that torch has not written."""
    return tensor._is_zerotensor()


def in_func_transform() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap) is at work."""
    import torch

    return torch._C._functorch.maybe_current_level() is not None


def is_func_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is one of a transform of torch.func."""
    import torch

    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def below_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Operations called inside are dispatched below autocast; ``device`` is "cpu" or "cuda"."""
    import torch

    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def cuda_stream(device: int) -> int:
    """The address of the current stream of a GPU."""
    import torch

    return torch._C._cuda_getCurrentRawStream(device)


def cuda_device() -> int:
    """The number of the current GPU, without the checks of ``torch.cuda.current_device``."""
    import torch

    return torch._C._cuda_getDevice()


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is one of torch's convolutions, of any number of dimensions, transposed or not."""
    from torch.nn.modules.conv import _ConvNd

    return isinstance(module, _ConvNd)


def module_hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """The hooks of a module, each with what it is called for: "forward pre-hook", ..., "state-dict hook"."""
    kinds = {
        "_forward_pre_hooks": "forward pre-hook",
        "_forward_hooks": "forward hook",
        "_backward_pre_hooks": "backward pre-hook",
        "_backward_hooks": "backward hook",
        "_state_dict_pre_hooks": "state-dict hook",
        "_state_dict_hooks": "state-dict hook",
        "_load_state_dict_pre_hooks": "state-dict hook",
        "_load_state_dict_post_hooks": "state-dict hook",
    }
    found = [(what, hook) for name, what in kinds.items() for hook in getattr(module, name, {}).values()]
    return [(what, getattr(hook, "hook", hook)) for what, hook in found]  # torch keeps some in a wrapper


def has_hooks(tensor: Tensor) -> bool:
    """Whether a hook waits for the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def is_flattened(module: nn.Module) -> bool:
    """Whether a FullyShardedDataParallel shows one flat parameter in place of those that were put into it."""
    return not module._use_orig_params


# -- torch.distributed ---------------------------------------------------------------------------------------------------


def process_groups() -> list[Any]:
    """All process groups of this process, whoever made them."""
    from torch.distributed import distributed_c10d

    return list(distributed_c10d._world.pg_map)


def set_time_out(group: Any, time_out: timedelta) -> None:
    """Give a process group that exists another time-out."""
    from torch.distributed import distributed_c10d

    distributed_c10d._set_pg_timeout(time_out, group)


def abort_process_groups() -> None:
    """End all process groups without waiting for anybody, so that ranks that wait in NCCL fall out of it."""
    from torch.distributed import distributed_c10d

    distributed_c10d._abort_process_group()


def default_store() -> Any:
    """The store through which the default process group met. RuntimeError where there is no group."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


# -- torch: many tensors at once -----------------------------------------------------------------------------------------


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors one after another in a new one."""
    from torch._utils import _flatten_dense_tensors

    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat


def unflattened(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The way back from `flattened`: views of ``flat`` in the shapes of ``like``."""
    from torch._utils import _unflatten_dense_tensors

    parts: Sequence[Tensor] = _unflatten_dense_tensors(flat, like)
    return parts


def norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The 2-norm of each tensor, in one call for all."""
    import torch

    return torch._foreach_norm(list(tensors))


def scale_(tensors: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply each tensor in place by a 0-d tensor, in one call for all."""
    import torch

    torch._foreach_mul_(list(tensors), scale)


# -- DeepSpeed -----------------------------------------------------------------------------------------------------------


def forget_deepspeed_groups() -> None:
    """Let DeepSpeed, if it was imported, forget its wrapper and its groups: it would take dead ones for live."""
    if "deepspeed.comm.comm" not in sys.modules:
        return
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    if hasattr(groups, "_release_process_group_references"):
        groups._release_process_group_references(group=None)


def leave_out_shared_memory_reduce() -> None:
    """No all-reduce over shared memory: DeepSpeed uses it in inference only, and compiles it at a first start (minutes)."""
    import deepspeed

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def reduce_nothing_in_backward(engine: Any) -> None:
    """Leave the gradients of a DeepSpeed engine at ZeRO stage 0 unreduced."""
    engine.enable_backward_allreduce = False


def averaged_gradients(engine: Any) -> dict[int, list[Tensor] | None]:
    """{parameter group: this rank's part of its gradients, averaged over ranks} between backward and step at ZeRO 1 and 2."""
    gradients: dict[int, list[Tensor] | None] = engine.optimizer.averaged_gradients
    return gradients


def link_optimizer_states(engine: Any) -> None:
    """Let parameters of every group find their part of ZeRO's state: DeepSpeed links once, after the first group's step."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def renew_master_weights(engine: Any) -> None:
    """Let ZeRO copy parameters that were written from outside into its master weights."""
    engine.optimizer.refresh_fp32_params()


# -- submitit ------------------------------------------------------------------------------------------------------------


def submission_errors() -> tuple[type[Exception], ...]:
    """What submitit raises where a cluster does not take a job."""
    from submitit.core.utils import FailedJobError

    return (RuntimeError, ValueError, OSError, FailedJobError)


def leave_outcome(path: Path, outcome: tuple[str, Any]) -> None:
    """Write what a task leaves, ("success", value) or ("error", text), as submitit itself would; whole or not at all."""
    from submitit.core import utils

    with utils.temporary_save_path(path) as partial:
        utils.cloudpickle_dump(outcome, partial)


# -- NVIDIA DALI: the pool of worker processes ---------------------------------------------------------------------------


def dali_pool(pipeline: Any) -> Any:
    """The worker processes of a built pipeline; ``pids()`` gives their ids."""
    return pipeline._py_pool


def never_close_dali_pool(pool: Any) -> None:
    """Let nobody wait for a pool that has lost a worker, at the latest when Python ends."""
    pool.close = lambda: None
