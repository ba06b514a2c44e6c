"""The operations below the layers: compiled for CPUs and GPUs, in torch as a fallback.

* :func:`select_experts` picks the experts of every pixel, :class:`Routing` holds the choice.
* :func:`expert_conv2d` applies only the chosen experts' filters.
* :func:`attach_routing_loss` is the identity in forward; in backward it finds which choices were right, damps the gradient
  of the wrong ones and gives the gate its gradient in closed form.
"""

from smoe_hpc.kernels import operators  # noqa: F401  registers torch.ops.smoe_hpc.expert_conv2d
from smoe_hpc.kernels.expert_conv import expert_conv2d
from smoe_hpc.kernels.quantile import row_quantiles
from smoe_hpc.kernels.routing import Routing
from smoe_hpc.kernels.routing_loss.attach import attach_routing_loss
from smoe_hpc.kernels.routing_loss.metrics import RoutingLossMetrics
from smoe_hpc.kernels.routing_loss.rules import RoutingLossRules
from smoe_hpc.kernels.routing_loss.state import PendingForward
from smoe_hpc.kernels.selection import select_experts

__all__ = [
    "PendingForward",
    "Routing",
    "RoutingLossMetrics",
    "RoutingLossRules",
    "attach_routing_loss",
    "expert_conv2d",
    "row_quantiles",
    "select_experts",
]
