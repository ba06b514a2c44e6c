"""Spatial Mixture-of-Experts for weather models: the layer, its training on many GPUs, the experiments of the paper.

Importing this package is cheap: each name below is imported when it is first used, and torch with it.

* in a network of your own: `SpatialMoE2d`, `replace_convolutions`, `routing_loss`, `end_step`, `parameter_groups`
* experiments by name: `train`, `evaluate`, `compare`, `submit`
* data: `open_store`, `open_dataset`
* a trained run: `load_run`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smoe_hpc.experiments import compare, evaluate, train
    from smoe_hpc.inference import load_run
    from smoe_hpc.io import open_dataset, open_store
    from smoe_hpc.jobs import submit
    from smoe_hpc.layers import SpatialMoE2d, end_step, parameter_groups, replace_convolutions, routing_loss

__version__ = "0.1.0"

__all__ = [
    "SpatialMoE2d",
    "__version__",
    "compare",
    "end_step",
    "evaluate",
    "load_run",
    "open_dataset",
    "open_store",
    "parameter_groups",
    "replace_convolutions",
    "routing_loss",
    "submit",
    "train",
]

_ROOMS = {
    "SpatialMoE2d": "layers",
    "compare": "experiments",
    "end_step": "layers",
    "evaluate": "experiments",
    "load_run": "inference",
    "open_dataset": "io",
    "open_store": "io",
    "parameter_groups": "layers",
    "replace_convolutions": "layers",
    "routing_loss": "layers",
    "submit": "jobs",
    "train": "experiments",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
