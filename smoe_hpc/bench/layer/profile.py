"""One case under a profiler: a few calls of each part, each with its name, and nothing else in the profile.

ncu --profile-from-start off --nvtx --set full -o layer smoe-hpc bench layer --profile --case "128x256 N1024"
nsys profile --capture-range cudaProfilerApi -t cuda,nvtx smoe-hpc bench layer --profile --case "128x256 N1024"
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from smoe_hpc.bench.layer.baselines import Call, Inputs
from smoe_hpc.bench.layer.ours import deterministic, make_inputs, ours
from smoe_hpc.bench.layer.routing import gate_values
from smoe_hpc.bench.layer.study import BASELINES, DTYPES, Scope
from smoe_hpc.bench.layer.timing import working_on
from smoe_hpc.errors import ConfigError

_WARM_UP, _CALLS = 3, 2


def profile(scope: Scope, say: Callable[[str], None]) -> list[str]:
    """Run the first case of the scope, part by part, ours in the first mode and then the baselines.

    Returns:
        The names of the NVTX ranges, in order: "part, way".

    Raises:
        ConfigError: on a CPU, which these profilers do not see.
    """
    device = torch.device(scope.device)
    if device.type != "cuda":
        raise ConfigError(f"--profile marks work for a GPU's profiler, device is {scope.device!r}; use --device cuda")
    with working_on(device):
        return _marked(scope, device, say)


def _marked(scope: Scope, device: torch.device, say: Callable[[str], None]) -> list[str]:
    case, dtype = scope.cases[0], DTYPES[scope.dtype]
    values = gate_values(case, device, steps=scope.training_steps, padding=scope.padding, dtype=dtype)
    inputs = make_inputs(case.shape, values, dtype, scope.padding)
    ways: dict[str, Callable[[str, Inputs], Call | None]] = {"ours": ours}
    ways |= {name: BASELINES[name] for name in scope.baselines}
    names = []
    for name, way in ways.items():
        for part in (*scope.parts, "select", "plan") if name == "ours" else scope.parts:
            with deterministic(scope.modes[0] and name == "ours"):
                call = partial(way, part, inputs)()
                if call is None:
                    continue
                for _ in range(_WARM_UP):
                    call()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                for _ in range(_CALLS):
                    with torch.cuda.nvtx.range(f"{part}, {name}"):
                        call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            names.append(f"{part}, {name}")
            say(f"{case}: {names[-1]}")
    return names
