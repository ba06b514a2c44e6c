"""Plans on a CUDA device: bindings of ``csrc/cuda/plan`` and of the transposition of indices in ``pack.cu``.

Dimensions: S choices, N experts, K selected, P pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.kernels.cuda.library import call
from smoe_hpc.kernels.planning.geometry import Geometry


def plan_cuda(index: Tensor, geometry: Geometry) -> list[Tensor]:
    """The tensors of the plan of ``index`` [S, P, K] int32, contiguous; one launch, nothing read back."""
    tables = [torch.empty(shape, dtype=dtype, device=index.device) for shape, dtype in geometry.shapes()]
    call(
        "smoe_plan",
        index,
        geometry.choices,
        *geometry.input_grid,
        *geometry.grid,
        geometry.num_experts,
        geometry.selected,
        geometry.kernel_size,
        geometry.offset,
        int(geometry.wrap),
        geometry.tile.rows,
        geometry.tile.columns,
        geometry.input_tile.rows,
        geometry.input_tile.columns,
        *geometry.region,
        *tables,
    )
    return tables


def to_index_cuda(indices: Tensor) -> Tensor:
    """Indices [K, H, W] or [S, K, H, W], int64, as [S, P, K], int32."""
    batched = (indices if indices.dim() == 4 else indices[None]).flatten(2).contiguous()
    choices, selected, pixels = batched.shape
    index = torch.empty(choices, pixels, selected, dtype=torch.int32, device=indices.device)
    call("smoe_transpose_indices", batched, choices, selected, pixels, index)
    return index
