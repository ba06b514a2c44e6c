"""Networks made of the layers."""

from smoe_hpc.models.build import build_model
from smoe_hpc.models.resnet import ResNet, build_resnet
from smoe_hpc.models.stack import Stack, build_stack

__all__ = ["ResNet", "Stack", "build_model", "build_resnet", "build_stack"]
