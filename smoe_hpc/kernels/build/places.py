"""Where a compiled library lies: its name says all that it depends on.

A folder for the sources, the flags, torch and the processor (``-march=native``) or, for GPUs, nvcc's environment; in it
``<compiler>.so``, or ``<compiler>-80-90.so`` with the compute capabilities that a library has code for.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from smoe_hpc.files.caches import Place, place_for
from smoe_hpc.kernels.build.compilers import Compiler
from smoe_hpc.kernels.build.loading import is_whole

SOURCES = Path(__file__).parents[1] / "csrc"
CPU_INFO = Path("/proc/cpuinfo")
NEWEST_GPU = 90  # compute capability; later GPUs get its intermediate code
CPU_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-cudart", "static")
_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")  # variables that nvcc reads


def cpu_place() -> Place:
    """The folder of the libraries for this processor.

    Raises:
        ConfigError: there is none that only this user and root can write to.
    """
    parts = _texts("cpu"), CPU_FLAGS, torch.__version__, platform.machine(), _processor()
    return place_for(f"kernels/cpu-{_digest(*parts)}", "*.so")


def cuda_place() -> Place:
    """The folder of the libraries for GPUs. ConfigError as of :func:`cpu_place`."""
    environment = [os.environ.get(name) for name in _ENVIRONMENT]
    parts = _texts("cuda"), CUDA_FLAGS, environment, torch.__version__, platform.machine()
    return place_for(f"kernels/cuda-{_digest(*parts)}", "*.so")


def library_in(place: Place, compiler: Compiler, capabilities: Iterable[int] = ()) -> Path:
    """The file of a library: the CPU's, or with code for GPUs of these compute capabilities."""
    return place.folder / f"{'-'.join([_digest(compiler), *map(str, capabilities)])}.so"


def libraries_in(place: Place, compiler: Compiler | None) -> list[Path]:
    """The whole libraries of a compiler; without one, of all."""
    pattern = f"{_digest(compiler)}*.so" if compiler else "*.so"
    return [path for path in sorted(place.folder.glob(pattern)) if is_whole(path, sources_of(path))]


def sources_of(library: Path) -> list[Path]:
    """What a library is compiled from."""
    if library.parent.name.startswith("cpu-"):
        return sorted((SOURCES / "cpu").glob("*.cpp"))
    every = sorted((SOURCES / "cuda").rglob("*.cu"))
    return [path for path in every if NEWEST_GPU in _capabilities(library) or not is_hopper(path)]


def include_folder() -> Path:
    """Where CUDA's sources look for what they include from another folder."""
    return SOURCES / "cuda"


def is_hopper(source: Path) -> bool:
    """Whether it has instructions that compute capability 9.0 alone has: the files below ``csrc/cuda/hopper``."""
    return source.is_relative_to(SOURCES / "cuda" / "hopper")


def serves(library: Path, capability: int) -> bool:
    """Whether a library has code for a GPU of a compute capability (90 for 9.0)."""
    built = _capabilities(library)
    if capability > NEWEST_GPU:
        return any(number > NEWEST_GPU for number in built)
    same_generation = {number for number in built if number // 10 == capability // 10 and number <= capability}
    return bool(same_generation) and capability <= NEWEST_GPU


def _capabilities(library: Path) -> set[int]:
    """Those in the name ``<compiler>-80-86-90``."""
    return {int(number) for number in library.stem.split("-")[1:]}


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _texts(device: str) -> list[tuple[str, bytes]]:
    folder = SOURCES / device
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in files]


def _processor() -> list[str]:
    """The lines of /proc/cpuinfo that decide what ``-march=native`` means."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = CPU_INFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    return [line for line in lines if line.partition(":")[0].strip() in wanted]
