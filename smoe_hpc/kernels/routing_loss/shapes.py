"""Whether gate values, indices and counts go together: checked in forward and again in backward.

Dimensions: B batch, N experts, K selected, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from torch import Tensor

from smoe_hpc.errors import ConfigError


def check_values(values: Tensor, indices: Tensor, batch: int) -> None:
    """Refuse gate values that do not belong to the pixels of the indices; ConfigError says what fits."""
    selected, *grid = indices.shape[-3:]
    experts, *pixels = values.shape[-3:] if values.dim() in (3, 4) else (0,)
    if pixels != grid or experts <= selected or (values.dim() == 4 and values.shape[0] != batch):
        raise ConfigError(
            f"values {list(values.shape)} do not fit indices {list(indices.shape)}: give [N, {grid[0]}, {grid[1]}] or "
            f"[{batch}, N, {grid[0]}, {grid[1]}], N above {selected}, or None to learn nothing"
        )


def check_collected(counts: Tensor, indices: Tensor, values: Tensor, batch: int) -> None:
    """Refuse what a custom ``collect`` returned if its shapes do not fit; ConfigError says what would."""
    check_values(values, indices, batch)
    each = [batch] if values.dim() == 4 or indices.dim() == 4 else []
    if list(counts.shape) != [*each, *indices.shape[-3:]] or (indices.dim() == 4 and indices.shape[0] not in (1, batch)):
        raise ConfigError(
            f"collect returned counts {list(counts.shape)}, indices {list(indices.shape)} and a batch of {batch} for values "
            f"{list(values.shape)}: give counts {[*each, *indices.shape[-3:]]}"
        )
