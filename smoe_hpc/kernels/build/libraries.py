"""Compiles the kernels' sources, at their first use or ahead, into libraries that ctypes loads.

Each library is a file in ``$SMOE_CACHE/kernels`` (``~/.cache/smoe-hpc/kernels``), named by everything it depends on: the
sources, the flags, torch, the processor (``-march=native``) or the GPUs' architectures, and the compiler. Where there is no
compiler, as on many compute nodes, any compiler's library of the same sources is used. Several processes, on one node or on
nodes that share the folder, wait for the one that compiles. Where another user could have put a library there, a private
folder is used instead (`smoe_hpc.files.caches`).
"""

from __future__ import annotations

import functools
import os
import platform
import stat
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.files.caches import Place
from smoe_hpc.kernels.build.compilers import find_cxx, find_nvcc
from smoe_hpc.kernels.build.compiling import Progress, compile_library
from smoe_hpc.kernels.build.loading import is_whole, or_warn
from smoe_hpc.kernels.build.once import make_once
from smoe_hpc.kernels.build.places import (
    CPU_FLAGS,
    CUDA_FLAGS,
    NEWEST_GPU,
    cpu_place,
    cuda_place,
    include_folder,
    is_hopper,
    libraries_in,
    library_in,
    serves,
    sources_of,
)

OLDEST_GPU = 80  # compute capability
_lock = threading.Lock()


def native() -> bool:
    """Whether compiled kernels are wanted: unless ``SMOE_KERNELS=torch``.

    Raises:
        ConfigError: the variable has another value than "native" or "torch".
    """
    choice = os.environ.get("SMOE_KERNELS") or "native"
    if choice not in ("native", "torch"):
        raise ConfigError(f"SMOE_KERNELS={choice!r} is not known; set it to native or torch, or not at all")
    return choice == "native"


def libraries_there() -> tuple[list[Path], list[Path]]:
    """The libraries that there are for this processor, and for GPUs; compiles nothing.

    Raises:
        ConfigError: there is no folder for them, or ``$CXX`` is no command.
    """
    return libraries_in(cpu_place(), find_cxx()), libraries_in(cuda_place(), find_nvcc())


# -- compiling -------------------------------------------------------------------------------------------------------------


def build_cpu(progress: Progress | None = None) -> Path:
    """The CPU's library, compiled if it is not there whole.

    Args:
        progress: called after each file.

    Raises:
        ConfigError: the folder cannot be written, or ``$CXX`` is no command.
        RunError: no compiler, or it fails.
    """
    compiler, place = find_cxx(), cpu_place()
    place.warn()
    for there in libraries_in(place, compiler):
        return there
    if compiler is None:
        raise RunError("no C++ compiler runs (g++, c++); install one or name it in CXX")
    native_flag = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    library = library_in(place, compiler)
    jobs = {source: [*compiler.command, *CPU_FLAGS, native_flag] for source in sources_of(library)}
    link = [*compiler.command, "-shared", "-Wl,--no-undefined"]
    return _make(place, library, jobs, link, f"compiling kernels for this processor with {compiler.command[0]}", progress)


def build_cuda(capabilities: Sequence[int], progress: Progress | None = None) -> Path:
    """A library for GPUs of these compute capabilities (80, 90, ...), compiled if it is not there whole.

    Above 90 it holds intermediate code, which the driver translates for the GPU it finds.

    Args:
        capabilities: what it is to have code for.
        progress: called after each file.

    Raises:
        ConfigError: a capability below 80, or a folder that cannot be written.
        RunError: no compiler, or it fails.
    """
    targets = sorted({min(capability, NEWEST_GPU + 10) for capability in capabilities})
    if not targets or targets[0] < OLDEST_GPU:
        raise ConfigError(f"CUDA kernels for {list(capabilities)}: compute capabilities are 80 (8.0) or more, such as 80,90")
    compiler, place = find_nvcc(), cuda_place()
    place.warn()
    for there in libraries_in(place, compiler):
        if all(serves(there, target) for target in targets):
            return there
    if compiler is None:
        raise RunError("no nvcc runs ($CUDA_HOME/bin, PATH); load CUDA's module, or set CUDA_HOME")
    library = library_in(place, compiler, targets)
    jobs = {}
    for source in sources_of(library):
        codes = ["-gencode=arch=compute_90a,code=sm_90a"] if is_hopper(source) else map(_code_for, targets)
        jobs[source] = [*compiler.command, *CUDA_FLAGS, f"-I{include_folder()}", *codes]
    link = [*compiler.command, "-shared", "-cudart", "static"]
    named = ", ".join(f"{target // 10}.{target % 10}" if target <= NEWEST_GPU else "later" for target in targets)
    what = f"compiling kernels for GPUs of compute capability {named} with {compiler.command[0]} (minutes)"
    return _make(place, library, jobs, link, what, progress)


def _code_for(target: int) -> str:
    if target > NEWEST_GPU:
        return f"-gencode=arch=compute_{NEWEST_GPU},code=compute_{NEWEST_GPU}"
    return f"-gencode=arch=compute_{target},code=sm_{target}"


def _make(
    place: Place, library: Path, jobs: Mapping[Path, Sequence[str]], link: Sequence[str], what: str, progress: Progress | None
) -> Path:
    def make(work: Path, made: Path) -> None:
        compile_library(jobs, link, made, progress)
        made.chmod(stat.S_IMODE(made.stat().st_mode) & ~0o022)  # whatever the umask: others' libraries are not loaded

    def wait() -> None:
        if progress is not None:
            _say(f"waiting for another process, which is {what}")

    try:
        place.make()
        return make_once(
            library,
            make,
            lambda: _say(f"{what}, into {library.parent}"),
            is_there=lambda path: is_whole(path, jobs),
            waits=wait,
        )
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"kernels cannot be written into {library.parent} ({reason}); free space, or set SMOE_CACHE to another folder"
        ) from None


def _say(line: str) -> None:
    print(f"smoe-hpc: {line}", file=sys.stderr, flush=True)


# -- for the kernels' bindings -------------------------------------------------------------------------------------


def cpu_library() -> Path | None:
    """The CPU's library, compiled if necessary; None, after one warning, where there is none."""
    with _lock:
        return _cpu_library()


def cuda_library(capability: int) -> Path | None:
    """The library for a GPU (90 for 9.0), compiled if necessary; None, after one warning, where there is none."""
    with _lock:
        return _cuda_library(min(capability, NEWEST_GPU + 10))


@functools.cache
def _cpu_library() -> Path | None:
    return or_warn("CPU", build_cpu)


@functools.cache
def _cuda_library(capability: int) -> Path | None:
    return or_warn("CUDA", lambda: build_cuda([capability]))
