"""The report of :func:`smoe_hpc.layers.replace_convolutions`: what became of each convolution.

Dimensions: H latitude rows, W longitude columns, N experts, K selected experts.
"""

from __future__ import annotations

from dataclasses import dataclass

Grid = tuple[int, int]


@dataclass(frozen=True)
class Replacement:
    """What became of one convolution.

    Args:
        name: of the module in the model; "" is the model itself.
        grid: (H, W) it works on, where that is known.
        num_experts: N, None where it was left as it is.
        selected: K, None where it was left as it is.
        gate: number of its gate, equal for layers that share one; None where it was left as it is.
        reason: why it was left as it is; None where it was replaced.
    """

    name: str
    grid: Grid | None
    num_experts: int | None = None
    selected: int | None = None
    gate: int | None = None
    reason: str | None = None

    def __str__(self) -> str:
        name = self.name or "(the model itself)"
        if self.reason is not None:
            return f"{name}: left, {self.reason}"
        assert self.grid is not None
        return f"{name}: {self.selected} of {self.num_experts} experts on {self.grid[0]}x{self.grid[1]}, gate {self.gate}"


@dataclass(frozen=True)
class ReplacementReport:
    """What became of every convolution of the model, in the model's order; ``print`` shows a line for each."""

    layers: tuple[Replacement, ...]

    @property
    def replaced(self) -> list[str]:
        """Names of the convolutions that were replaced."""
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def left(self) -> dict[str, str]:
        """Names of those that were left, with the reason."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))
