"""Networks made of the layers."""

from smoe_hpc.models.stack import Stack, build_stack

__all__ = ["Stack", "build_stack"]
