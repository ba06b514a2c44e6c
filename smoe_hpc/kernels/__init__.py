"""The operations under the layers: compiled for CPUs and GPUs; in plain torch where neither serves.

* :func:`select_experts` picks the experts of every pixel, :class:`Routing` holds the choice.
* :func:`expert_conv2d` applies only the chosen experts' filters.
* :func:`route_signal` is the identity in forward; in backward it reads off which choices were right, damps the gradient
  of the wrong ones and gives the gate its gradient in closed form.
"""

from smoe_hpc.kernels.expert_conv import expert_conv2d
from smoe_hpc.kernels.quantile import row_quantiles
from smoe_hpc.kernels.routing import Routing, select_experts
from smoe_hpc.kernels.signal import SignalMetrics, SignalRules, route_signal

__all__ = ["Routing", "SignalMetrics", "SignalRules", "expert_conv2d", "route_signal", "row_quantiles", "select_experts"]
