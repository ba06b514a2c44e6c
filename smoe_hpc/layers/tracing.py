"""Tracers that do not support the layer, refused in one line where torch would fail with an assertion."""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_hpc.compat import in_func_transform
from smoe_hpc.errors import ConfigError
from smoe_hpc.layers.moving import autocast_type

_INSTEAD = "use torch.export (torch.export.save, torch.export.load) or torch.compile, which see the layer's operation as one"


def refuse_script() -> None:
    """Refuse torch.jit.script, which cannot express most of what a gate does.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"torch.jit.script cannot compile SpatialMoE2d; {_INSTEAD}")


def refuse_tracing(x: Tensor) -> None:
    """Refuse torch.func, torch.jit.trace and ONNX, which do not support the layer, and an export under autocast.

    Raises:
        ConfigError: one of them is at work.
    """
    if not torch.compiler.is_compiling() and in_func_transform():
        raise ConfigError(
            "torch.func.grad, vjp, jvp and vmap have no form for SpatialMoE2d; use torch.autograd.grad(..., create_graph=True) "
            "or torch.autograd.functional (torch.func.functional_call works)"
        )
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        raise ConfigError(f"torch.jit.trace and ONNX have no form for SpatialMoE2d; {_INSTEAD}")
    # Some versions of torch.compile claim to export, so whatever Dynamo traces (also export with strict=True) is allowed.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting and autocast_type(x.device.type) is not None:
        raise ConfigError(
            "torch.export under autocast gives a program that cannot be loaded again; export outside of torch.autocast, after "
            "model.to(torch.bfloat16) if it is to compute in 16 bits"
        )
