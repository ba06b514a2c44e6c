"""Convolution with the filters of the experts that each pixel selected.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.

What runs it: compiled kernels of the CPU (:mod:`smoe_hpc.kernels.cpu`) or the GPU (:mod:`smoe_hpc.kernels.cuda`), or plain
torch (:mod:`smoe_hpc.kernels.torch_forms`) where there is no compiler or ``SMOE_KERNELS=torch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import ops


def expert_conv2d(
    x: Tensor, weight: Tensor, indices: Tensor, *, padding: str = "zeros", plan: Sequence[Tensor] = ()
) -> Tensor:
    """Each pixel's selected experts applied to the input around it.

    Under autocast it computes in autocast's type, unless one of the tensors is float64.

    Args:
        x: [B, C, H, W]; float32, float64, bfloat16 or float16.
        weight: [N, F, C, k, k], k odd.
        indices: [K, H, W] or [B, K, H, W], int64 or int32 in 0..N-1; on a GPU all different at a pixel. A GPU's are looked
            at once, in eager mode only: in a compiled or captured graph they have to be right.
        padding: "zeros", "periodic_longitude" or "sphere"; see :func:`smoe_hpc.kernels.padding.pad`.
        plan: tensors of the plan of these indices, which a GPU's kernels use; without them one is made in every call.

    Returns:
        [B, K F, H, W]; channel ``k * F + f`` is filter f of the k-th selected expert. Channels last on a GPU, on a CPU
        in the memory format of ``x``.

    Raises:
        ConfigError: shapes that do not go together, other types, input and weights of different types that autocast does
            not bring together, sparse tensors, tensors on several devices, indices out of range, or on a GPU an expert that
            a pixel selects twice.
    """
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        x, weight = ops.autocast(x, weight, device)
    elif x.dtype != weight.dtype:
        raise ConfigError(ops.types_message(x, weight))
    return ops.expert_conv2d(x, weight, indices, padding, plan)
