"""Padding, as the layers see it: see :mod:`smoe_hpc.kernels.padding`."""

from smoe_hpc.kernels.padding import PADDINGS, check_padding, pad

__all__ = ["PADDINGS", "check_padding", "pad"]
