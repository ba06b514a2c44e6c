"""What the routing loss keeps from a forward to its backward, and within one.

Dimensions: B batch, K selected, F filters per expert, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from smoe_hpc.errors import SmoeError
from smoe_hpc.kernels.routing_loss.metrics import RoutingLossMetrics
from smoe_hpc.kernels.routing_loss.rules import RoutingLossRules

Collect = Callable[[Tensor, Tensor, int], "tuple[Tensor, Tensor, int]"]


def everything(counts: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    """The ``collect`` of a gate whose pixels are all here."""
    return counts, indices, batch


def whole() -> float:
    """The ``share`` of a layer that has its gate for itself."""
    return 1.0


class PendingForward:
    """A forward whose backward may come. It lives as long as the graph of the layer's output; others keep weak references, so
    that memory is freed with the output.

    Args:
        asked_before: ``routing_loss(model)`` was called before this forward, so that its scalar is in no loss.

    ``scalar`` [0-d] is the zero, or ``auxiliary`` loss, that carries the scale; ``done``, whether its graph was given up by a
    backward; ``read``, the backward pass and the reading by which the scale came last; ``scale``, that pass and the scale,
    where it did not come through the scalar.
    """

    def __init__(self, asked_before: bool = False) -> None:
        self.asked_before = asked_before
        self.scalar: Tensor | None = None
        self.auxiliary = False
        self.done = False
        self.read: tuple[int, object] = (-1, None)
        self.scale: tuple[int, Tensor | None] = (-1, None)

    def take_scale(self, number: int) -> Tensor | None:
        """What was left here in backward pass ``number``, 0-d."""
        (of, scale), self.scale = self.scale, (-1, None)
        return scale if of == number else None


@dataclass(frozen=True, eq=False)
class LabelsAndDamping:
    """Labels and damping that a backward found: constants for its derivatives.

    Args:
        factors: [B, K F, H, W], what damping multiplies the gradient with; None: no damping.
        counts, indices, batch: of the pixels whose values are here, as ``collect`` gave them; counts None: no labels.
    """

    factors: Tensor | None = None
    counts: Tensor | None = None
    indices: Tensor | None = None
    batch: int = 0


@dataclass(frozen=True, eq=False)
class OutputGradient:
    """What the output's node hands to the labelling one within a backward: the gradient there [B, K F, H, W], what forward
    kept, and the scale if it did not come through the scalar."""

    grad: Tensor
    kept: tuple[Tensor | None, ...]
    scale: Tensor | None
    asked_before: bool


@dataclass(eq=False)
class Attachment:
    """What the nodes of one forward share.

    Args:
        rules, filters, metrics, collect, share: see :func:`smoe_hpc.kernels.attach_routing_loss`.
        apart: weights multiply the experts' outputs between the two nodes.

    ``recorded`` keeps what each backward that was itself recorded (create_graph) found, by its number; ``again`` says in which
    backward pass derivatives of such a one come back, and ``held`` what it had found.
    """

    rules: RoutingLossRules
    filters: int
    metrics: RoutingLossMetrics
    collect: Collect
    share: Callable[[], float]
    apart: bool = False
    at_output: OutputGradient | None = None
    recorded: dict[int, LabelsAndDamping] = field(default_factory=dict)
    again: int = -1
    held: LabelsAndDamping | None = None

    def come_back(self, number: int, of: int) -> None:
        """In backward pass ``number`` derivatives of the recorded pass ``of`` may reach this forward.

        Raises:
            SmoeError: derivatives of another pass do so too, with other labels or damping.
        """
        found = self.recorded.get(of)
        if self.again == number and (found is None or found is self.held):
            return  # pass ``of`` went through here no more than the way back from it does
        if self.again == number and self.held is not None:
            raise SmoeError(
                "second derivatives of two losses through one forward of SpatialMoE2d, whose labels differ, meet in one "
                "backward; take one at a time, or run the forward once for each loss"
            )
        self.again, self.held = number, found
