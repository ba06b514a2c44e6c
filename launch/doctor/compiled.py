"""What the doctor finds of the compiled kernels: their compilers, the switch, and the libraries that lie ready.

The kernels are imported where they are looked at: an installation in which that fails is a finding.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from smoe_hpc.errors import ConfigError
from smoe_hpc.launch.doctor.finding import Finding, first_line, lines_of, match

_LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('loaded')"


def cxx_finding() -> Finding:
    """The C++ compiler, which makes the kernels for a CPU."""
    from smoe_hpc.kernels.build.compilers import find_cxx

    name = "C++ compiler"
    try:
        compiler = find_cxx()
    except ConfigError as error:
        return Finding(name, "problem", f"CXX={os.environ.get('CXX')!r}", str(error))
    if compiler is None:
        value = f"{os.environ.get('CXX') or 'g++'} does not run"
        if _fallback_is_selected():
            return Finding(name, "absent", value, "not needed: SMOE_KERNELS=torch selects the fallback")
        remedy = "the slow fallback in torch is used, unless kernels were compiled ahead; install g++ or set CXX"
        return Finding(name, "problem", value, remedy)
    value = f"{' '.join(compiler.command)}: {(compiler.version.splitlines() or ['no version'])[0]}"
    if _fallback_is_selected():
        return Finding(name, "present", value, "compiles nothing: SMOE_KERNELS=torch selects the fallback")
    return Finding(name, "used", value, "compiles the CPU kernels at their first use, in seconds")


def nvcc_finding() -> Finding:
    """CUDA's compiler, which makes the kernels for a GPU."""
    home = os.environ.get("CUDA_HOME")
    lines = lines_of(str(Path(home, "bin", "nvcc")) if home else "nvcc", "--version")
    release = next((line for line in lines or () if "release" in line), None)
    if release is None:
        return Finding(
            "nvcc", "absent", "no CUDA compiler", "the slow fallback in torch is used, unless kernels were compiled ahead"
        )
    import torch

    version = match(r"release ([\d.]+)", release)
    if not torch.cuda.is_available():
        return Finding("nvcc", "present", f"CUDA {version}", "compiles CUDA kernels ahead: smoe-hpc kernels build")
    same = version.split(".")[0] == (torch.version.cuda or "").split(".")[0]
    if not same:
        remedy = "another major version than torch's build: set CUDA_HOME to a matching one"
        return Finding("nvcc", "problem", f"CUDA {version}, torch {torch.version.cuda}", remedy)
    if _fallback_is_selected():
        return Finding("nvcc", "present", f"CUDA {version}", "compiles nothing: SMOE_KERNELS=torch selects the fallback")
    return Finding("nvcc", "used", f"CUDA {version}", "compiles CUDA kernels at their first use")


def kernels_finding() -> Finding:
    """The switch, the cache folder that can be trusted, and the libraries in it that would serve here; compiles nothing."""
    from smoe_hpc.kernels.build import libraries

    switch = f"SMOE_KERNELS={os.environ['SMOE_KERNELS']}" if os.environ.get("SMOE_KERNELS") else "SMOE_KERNELS not set"
    try:
        wanted = libraries.native()
        cpu, cuda = libraries.libraries_there()
    except ConfigError as error:
        return Finding("kernels", "problem", switch, str(error))
    there = [f"CPU library {cpu[0].name}" if cpu else "no CPU library"]
    there += [f"CUDA library {library.name}" for library in cuda] or ["no CUDA library"]
    value = f"{switch}; in {libraries.cpu_place().folder.parent}: {', '.join(there)}"
    if not wanted:
        return Finding("kernels", "present", value, "the fallback is used, as SMOE_KERNELS says; unset it for compiled kernels")
    refused = libraries.cpu_place().instead
    if refused is not None:
        remedy = f"{refused}: nothing is loaded from there; take others' right to write away, or set SMOE_CACHE"
        return Finding("kernels", "problem", value, remedy)
    if not cpu:
        return Finding("kernels", "absent", value, "compiled at first use if a compiler runs, or by smoe-hpc kernels build")
    if first_line(sys.executable, "-c", _LOAD, str(cpu[0])) is None:  # a process of its own: half a library may end it
        remedy = (
            "the CPU library cannot be loaded, the fallback is used; delete it, or set SMOE_CACHE to a folder without noexec"
        )
        return Finding("kernels", "problem", value, remedy)
    return Finding("kernels", "used", value, "compiled kernels are used; what is missing is compiled at first use")


def _fallback_is_selected() -> bool:
    return os.environ.get("SMOE_KERNELS") == "torch"
