"""Compiles the kernels' sources, at their first use or ahead, into libraries that ctypes loads.

Each library is a file in ``$SMOE_CACHE/kernels`` (``~/.cache/smoe-hpc/kernels``), named by everything it depends on: the
sources, the flags, torch, the processor (``-march=native``) or the GPUs' architectures, and the compiler. Where there is no
compiler, as on many compute nodes, a library that any compiler made of the same sources serves. Processes that come at
once, on one node or several that share the folder, wait for the one that compiles.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.kernels.compilers import Compiler, find_cxx, find_nvcc
from smoe_hpc.kernels.once import make_once

SOURCES = Path(__file__).parent / "csrc"
OLDEST_GPU, NEWEST_GPU = 80, 90  # compute capabilities; later GPUs get the intermediate code of the newest
_CPU_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-cudart", "static")
_MOST_JOBS = 8  # compilers at a time; one of CUDA takes a gigabyte
_LAST_LINES = 12  # of a compiler's complaint
_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")  # what nvcc heeds unasked
_lock = threading.Lock()
T = TypeVar("T")


def native() -> bool:
    """Whether compiled kernels are wanted: unless ``SMOE_KERNELS=torch``.

    Raises:
        ConfigError: the variable has another value than "native" or "torch".
    """
    choice = os.environ.get("SMOE_KERNELS") or "native"
    if choice not in ("native", "torch"):
        raise ConfigError(f"SMOE_KERNELS={choice!r} is not known; set it to native or torch, or not at all")
    return choice == "native"


def kernels_folder() -> Path:
    """Where libraries are kept.

    Raises:
        ConfigError: no variable names a place, and the user has no home.
    """
    cache = os.environ.get("SMOE_CACHE")
    if cache:
        return Path(cache) / "kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoe-hpc" / "kernels"
    except RuntimeError:
        raise ConfigError("no home folder to keep compiled kernels in (HOME is not set); set SMOE_CACHE to a folder") from None


# -- where a library is ----------------------------------------------------------------------------------------------------


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _texts(room: str) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted((SOURCES / room).iterdir()) if path.is_file()]


def _processor() -> list[str]:
    """The lines of /proc/cpuinfo that decide what ``-march=native`` means."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    return [line for line in lines if line.partition(":")[0].strip() in wanted]


def _cpu_folder() -> Path:
    return kernels_folder() / f"cpu-{_digest(_texts('cpu'), _CPU_FLAGS, torch.__version__, platform.machine(), _processor())}"


def _cuda_folder() -> Path:
    environment = [os.environ.get(name) for name in _ENVIRONMENT]
    return kernels_folder() / f"cuda-{_digest(_texts('cuda'), _CUDA_FLAGS, environment, torch.__version__, platform.machine())}"


def _made_by(compiler: Compiler | None) -> str:
    """Pattern of the names of a compiler's libraries; without one, of everybody's."""
    return f"{_digest(compiler)}*.so" if compiler else "*.so"


def libraries_there() -> tuple[list[Path], list[Path]]:
    """The libraries that would serve this processor, and GPUs, without compiling.

    Raises:
        ConfigError: there is no folder for them, or ``$CXX`` is no command.
    """
    return sorted(_cpu_folder().glob(_made_by(find_cxx()))), sorted(_cuda_folder().glob(_made_by(find_nvcc())))


def _serves(library: Path, capability: int) -> bool:
    """Whether a library named ``<compiler>-80-86-90`` has code for a GPU."""
    built = {int(number) for number in library.stem.split("-")[1:]}
    if capability > NEWEST_GPU:
        return any(number > NEWEST_GPU for number in built)
    same_generation = {number for number in built if number // 10 == capability // 10 and number <= capability}
    return bool(same_generation) and capability <= NEWEST_GPU


# -- compiling -------------------------------------------------------------------------------------------------------------


def build_cpu() -> Path:
    """The CPU's library, compiled if it is not there.

    Raises:
        ConfigError: the folder cannot be written, or ``$CXX`` is no command.
        RunError: no compiler, or it fails.
    """
    compiler, folder = find_cxx(), _cpu_folder()
    for there in sorted(folder.glob(_made_by(compiler))):
        return there
    if compiler is None:
        raise RunError("no C++ compiler runs (g++, c++); install one or name it in CXX")
    native_flag = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    flags = (*_CPU_FLAGS, native_flag)
    jobs: dict[Path, tuple[str, ...]] = dict.fromkeys(sorted((SOURCES / "cpu").glob("*.cpp")), flags)
    found = compiler

    def compile_into(work: Path, library: Path) -> None:
        _compile(found, jobs, work)
        _run([*found.command, "-shared", "-Wl,--no-undefined", "-o", str(library), *map(str, sorted(work.glob("*.o")))])

    what = f"compiling kernels for this processor with {compiler.command[0]}"
    return _make(folder / f"{_digest(compiler)}.so", compile_into, what)


def build_cuda(capabilities: Sequence[int]) -> Path:
    """A library for GPUs of these compute capabilities (80, 90, ...), compiled if it is not there.

    Above 90 it holds intermediate code, which the driver translates for the GPU it finds.

    Raises:
        ConfigError: a capability below 80, or a folder that cannot be written.
        RunError: no compiler, or it fails.
    """
    targets = sorted({min(capability, NEWEST_GPU + 10) for capability in capabilities})
    if not targets or targets[0] < OLDEST_GPU:
        raise ConfigError(f"CUDA kernels for {list(capabilities)}: compute capabilities are 80 (8.0) or more, such as 80,90")
    compiler, folder = find_nvcc(), _cuda_folder()
    for there in sorted(folder.glob(_made_by(compiler))):
        if all(_serves(there, target) for target in targets):
            return there
    if compiler is None:
        raise RunError("no nvcc runs ($CUDA_HOME/bin, PATH); load CUDA's module, or set CUDA_HOME")
    jobs = {}
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        if not source.stem.endswith("_hopper"):
            jobs[source] = (*_CUDA_FLAGS, *map(_code_for, targets))
        elif NEWEST_GPU in targets:  # instructions that this architecture alone has
            jobs[source] = (*_CUDA_FLAGS, "-gencode=arch=compute_90a,code=sm_90a")
    found = compiler

    def compile_into(work: Path, library: Path) -> None:
        _compile(found, jobs, work)
        _run([*found.command, "-shared", "-cudart", "static", "-o", str(library), *map(str, sorted(work.glob("*.o")))])

    named = ", ".join(f"{target // 10}.{target % 10}" if target <= NEWEST_GPU else "later" for target in targets)
    what = f"compiling kernels for GPUs of compute capability {named} with {compiler.command[0]} (minutes)"
    name = "-".join([_digest(compiler), *map(str, targets)])
    return _make(folder / f"{name}.so", compile_into, what)


def _code_for(target: int) -> str:
    if target > NEWEST_GPU:
        return f"-gencode=arch=compute_{NEWEST_GPU},code=compute_{NEWEST_GPU}"
    return f"-gencode=arch=compute_{target},code=sm_{target}"


def _make(library: Path, compile_into: Callable[[Path, Path], None], what: str) -> Path:
    try:
        return make_once(library, compile_into, lambda: _say(f"{what}, into {library.parent}"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"kernels cannot be written into {library.parent} ({reason}); free space, or set SMOE_CACHE to another folder"
        ) from None


def _compile(compiler: Compiler, jobs: dict[Path, tuple[str, ...]], work: Path) -> None:
    """Every source with its flags into an object file in ``work``, a few at a time."""
    commands = [
        [*compiler.command, *flags, "-c", "-o", str(work / f"{source.stem}.o"), str(source)] for source, flags in jobs.items()
    ]
    with ThreadPoolExecutor(max_workers=min(_MOST_JOBS, _cores())) as pool:
        list(pool.map(_run, commands))


def _cores() -> int:
    """Those of this process, where the system tells them apart from all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-_LAST_LINES:]
        raise RunError("\n".join([f"{command[0]} ended with status {done.returncode} on {command[-1]}:", *said]))


def _say(line: str) -> None:
    print(f"smoe-hpc: {line}", file=sys.stderr, flush=True)


# -- what the kernels' callers ask for -------------------------------------------------------------------------------------


def cpu_library() -> Path | None:
    """The CPU's library, compiled if need be; None, after one warning, where it cannot be had."""
    with _lock:
        return _cpu_library()


def cuda_library(capability: int) -> Path | None:
    """The library for a GPU (90 for 9.0), compiled if need be; None, after one warning, where it cannot be had."""
    with _lock:
        return _cuda_library(min(capability, NEWEST_GPU + 10))


@functools.cache
def _cpu_library() -> Path | None:
    return _or_warn("CPU", build_cpu)


@functools.cache
def _cuda_library(capability: int) -> Path | None:
    return _or_warn("CUDA", lambda: build_cuda([capability]))


def load(library: Path) -> ctypes.CDLL:
    """The library in this process.

    Raises:
        RunError: it cannot be loaded: no whole library, or in a folder that programs may not run from.
    """
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RunError(
            f"{library} cannot be loaded ({str(error).removeprefix(f'{library}: ')}); delete the file, so that it is compiled "
            "anew, or set SMOE_CACHE to a folder whose file system lets programs run (no noexec)"
        ) from None


def load_or_warn(which: str, library: Path) -> ctypes.CDLL | None:
    """`load`; None, after a warning, where the library cannot be loaded."""
    return _or_warn(which, lambda: load(library), "loaded")


def _or_warn(which: str, get: Callable[[], T], done: str = "compiled") -> T | None:
    try:
        return get()
    except (RunError, ConfigError, OSError) as error:
        warnings.warn(
            f"the {which} kernels cannot be {done}, the slower torch form serves: {error}\n"
            "(`smoe-hpc kernels build` compiles them ahead; SMOE_KERNELS=torch asks for the torch form)",
            stacklevel=4,
        )
        return None
