"""Verbs for the compiled kernels: ``smoe-hpc kernels ...``."""

from __future__ import annotations

from typing import Annotated

import typer

from smoe_hpc.cli.figures import JsonFile, write_json
from smoe_hpc.cli.output import progress, say
from smoe_hpc.errors import ConfigError, RunError

app = typer.Typer(help="Compile the kernels ahead of time.", no_args_is_help=True)


@app.callback()
def _kernels() -> None:
    """Compile the kernels ahead of time."""


@app.command()
def build(
    arch: Annotated[
        str | None,
        typer.Option(help="Compute capabilities of the GPUs, such as 80,90; those here, or 80,90 where there is none."),
    ] = None,
    cpu: Annotated[bool | None, typer.Option("--cpu/--no-cpu", help="The CPU's; by default where g++ is there.")] = None,
    cuda: Annotated[bool | None, typer.Option("--cuda/--no-cuda", help="CUDA's; by default where nvcc is there.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compile now what training would compile at its first step; works on a login node without a GPU.

    The libraries lie in $SMOE_CACHE/kernels (~/.cache/smoe-hpc/kernels), which the compute nodes must see. The CPU's
    serves processors of the same make as this one; others compile their own at first use. It is loaded once to see that
    it runs here. Exit status 2 where nothing could be built.
    """
    from smoe_hpc.kernels.build import libraries as kernels
    from smoe_hpc.kernels.build.loading import load

    capabilities = _capabilities(arch)
    built: dict[str, str] = {}
    if cpu or (cpu is None and kernels.find_cxx() is not None):
        with progress("CPU kernels", each=True) as report:
            made = kernels.build_cpu(report)
        load(made)
        built["cpu"] = str(made)
        say(f"CPU kernels: {built['cpu']}")
    elif cpu is None:
        say("CPU kernels: not built, no C++ compiler runs (g++, c++, $CXX)")
    if cuda or (cuda is None and kernels.find_nvcc() is not None):
        with progress("CUDA kernels", each=True) as report:
            built["cuda"] = str(kernels.build_cuda(capabilities, report))
        say(f"CUDA kernels for {', '.join(map(str, capabilities))}: {built['cuda']}")
    elif cuda is None:
        say("CUDA kernels: not built, no nvcc runs ($CUDA_HOME/bin, PATH)")
    if not built:
        raise RunError("no kernels were built; name a C++ compiler in CXX, or the folder of CUDA in CUDA_HOME, and ask for one")
    write_json(json_file, built)


def _capabilities(arch: str | None) -> list[int]:
    if arch is None:
        import torch

        here = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        return sorted(10 * major + minor for major, minor in here) or [80, 90]
    try:
        return [int(word) for word in arch.split(",")]
    except ValueError:
        raise ConfigError(f"--arch {arch}: give compute capabilities as whole numbers, such as 80,90") from None
