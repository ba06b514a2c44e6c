"""The expert convolution's input gradient on Hopper GPUs, bfloat16 and float16: ``input_grad_hopper.cu``.

C and K F have to be multiples of 8; a kernel has one tap or nine. Sums are float32, rounded once.

Dimensions: B batch, C input channels, H, W input rows and columns, Ho, Wo of the output, N experts, K selected, F filters per
expert, k kernel size.
"""

from __future__ import annotations

from torch import Tensor

from smoe_hpc.kernels.cuda.hopper import task
from smoe_hpc.kernels.cuda.library import call
from smoe_hpc.kernels.plan import Plan


def input_grad(g: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """The gradient that reaches the input.

    A gradient that is not finite reaches the inputs it belongs to and no others. A weight that is not finite may also reach
    the pixels near those that select its expert.

    Args:
        g: [B, Ho, Wo, K F], contiguous, 16-byte aligned.
        weights: [N F, k k, C], contiguous, 16-byte aligned, of the dtype of ``g``.
        plan: of the routing, for this batch. The selections of a pixel must differ from one another.

    Returns:
        [B, H, W, C].

    Raises:
        Unsupported: another GPU, or a dtype, a number of channels, a kernel size, an alignment or a tile that the kernel does
            not have.
    """
    geometry = plan.geometry
    dx = g.new_empty(g.shape[0], *geometry.input_grid, weights.shape[-1])
    arguments = task(g.shape[0], weights, plan.input_grad, geometry.input_tile, geometry, g)
    call("smoe_input_grad_hopper", g, weights, dx, *arguments)
    return dx
