"""Looking at the machine, one thing after another, and the list of what was found.

:func:`inspect_machine` looks and changes nothing; every look is bounded in time, and one that fails is a finding like any
other. :func:`render` shows the list to a person.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from smoe_hpc.launch.doctor.compiled import cxx_finding, kernels_finding, nvcc_finding
from smoe_hpc.launch.doctor.finding import Finding, first_line, match
from smoe_hpc.text import printable

GIB = 2**30
COLOURS = {"used": "green", "present": "default", "absent": "yellow", "problem": "red"}


def inspect_machine(folder: str | os.PathLike[str] = ".") -> list[Finding]:
    """Look at everything training, data preparation and tests may want; takes a few seconds, most for importing torch.

    Args:
        folder: where runs would be written; its file system is the one looked at.
    """
    looks: tuple[tuple[str, Callable[[], Finding | list[Finding]]], ...] = (
        ("Python", _python),
        ("cores", _cores),
        ("memory", _memory),
        ("disk", lambda: _disk(Path(folder))),
        ("torch", _torch),
        ("GPU", _gpus),
        ("NCCL", _nccl),
        ("DeepSpeed", _deepspeed),
        ("MPI", _mpi),
        ("Slurm", _slurm),
        ("C++ compiler", cxx_finding),
        ("ninja", _ninja),
        ("nvcc", nvcc_finding),
        ("kernels", kernels_finding),
        ("HDF5", _hdf5),
        ("DALI", _dali),
        ("GRIB", _grib),
    )
    findings: list[Finding] = []
    for name, look in looks:
        try:
            found = look()
        except Exception as error:  # a broken installation fails in many ways, and the others are still worth seeing
            found = Finding(
                name,
                "problem",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "reinstall it",
            )
        findings += found if isinstance(found, list) else [found]
    return findings


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table for a terminal."""
    table = Table("", "state", "found", "use", title="What this machine has", title_justify="left")
    for finding in findings:
        colour = COLOURS[finding.state]
        table.add_row(finding.name, f"[{colour}]{finding.state}[/]", _escaped(finding.value), _escaped(finding.use))
    return table


def _escaped(text: str) -> str:
    return printable(text).replace("[", r"\[")  # rich would read a bracket as markup


def _python() -> Finding:
    where = sys.executable + ("" if sys.prefix == sys.base_prefix else " (virtual environment)")
    return Finding("Python", "used", f"{platform.python_version()}, {where}", "3.10 or newer is needed")


def _cores() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    note = "torch's threads" if usable == there else "torch's threads; the rest is not given to this process"
    return Finding("cores", "used", f"{usable} of {there}", note)


def _memory() -> Finding:
    text = Path("/proc/meminfo").read_text()
    total, available = (int(match(rf"{key}:\s+(\d+) kB", text)) * 1024 / GIB for key in ("MemTotal", "MemAvailable"))
    return Finding("memory", "used", f"{total:.1f} GiB, {available:.1f} free", "stores are read through the page cache")


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    value = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} at {folder.resolve()}"
    if usage.free < GIB:
        return Finding(
            "disk", "problem", value, "too little for a run and its checkpoints; free some, or set run.root elsewhere"
        )
    return Finding("disk", "used", value, "data, runs and checkpoints")


def _torch() -> Finding:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return Finding("torch", "used", f"{torch.__version__}, {build}", f"{torch.get_num_threads()} threads")


def _gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        findings = []
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            value = f"{about.name}, {about.total_memory / GIB:.1f} GiB, compute capability {about.major}.{about.minor}"
            findings.append(Finding(f"GPU {index}", "used", value, "training runs here, one process a GPU"))
        return findings
    driver = first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if driver is None:
        return [Finding("GPU", "absent", "no NVIDIA driver", "training runs on the CPU")]
    remedy = "reinstall torch by launch/quickstart.sh, which fits it to the driver; until then training runs on the CPU"
    return [Finding("GPU", "problem", f"{driver}, but this torch cannot use it", remedy)]


def _nccl() -> Finding:
    import torch

    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        return Finding("NCCL", "used", ".".join(map(str, torch.cuda.nccl.version())), "processes talk through it on GPUs")
    return Finding("NCCL", "absent", "needs a GPU", "processes talk through gloo on the CPU")


def _deepspeed() -> Finding:
    version = _version("deepspeed")
    if version is None:
        return Finding("DeepSpeed", "problem", "not installed", "the training engine; pip install deepspeed")
    return Finding("DeepSpeed", "used", version, "the training engine")


def _mpi() -> Finding:
    started_by = shutil.which("mpirun")
    mpirun = first_line("mpirun", "--version")
    # in a process of its own: loading an MPI library that does not fit this machine may end the process
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0].split(',')[0])"
    library = first_line(sys.executable, "-c", "import mpi4py; mpi4py.rc.initialize = False; " + code)
    if mpirun is None and library is None:
        remedy = "needed by parallel data conversion and an mpirun start only; torchrun and srun do without"
        return Finding("MPI", "absent", "no mpirun, no MPI library", remedy)
    value = f"{mpirun or 'no mpirun'} ({started_by}); mpi4py uses {library or 'no library'}"
    if mpirun is None or library is None:
        return Finding("MPI", "problem", value, "install the missing half, from the same MPI")
    kinds = [bool(re.search(r"open.?(mpi|rte)|prrte", text, re.I)) for text in (mpirun, library)]
    if kinds[0] != kinds[1]:
        return Finding("MPI", "problem", value, "two different MPIs: every process would believe itself alone; keep one")
    return Finding("MPI", "present", value, "parallel data conversion; training may be started with it")


def _slurm() -> Finding:
    version = first_line("sinfo", "--version")
    if version is None:
        return Finding("Slurm", "absent", "no sinfo", "start with torchrun or mpirun")
    job = os.environ.get("SLURM_JOB_ID")
    value = version + (f", inside job {job}" if job else "")
    return Finding("Slurm", "present", value, "start with srun; no ssh is used")


def _ninja() -> Finding:
    version = first_line(str(Path(sys.executable).with_name("ninja")), "--version") or first_line("ninja", "--version")
    if version is None:
        return Finding("ninja", "absent", "does not run", "only DeepSpeed's own operations need it; pip install ninja")
    return Finding("ninja", "present", version, "for DeepSpeed's own operations; our kernels need none")


def _hdf5() -> Finding:
    import h5py

    build = "with MPI" if h5py.get_config().mpi else "without MPI"
    return Finding("HDF5", "used", f"{h5py.version.hdf5_version}, h5py {h5py.__version__} {build}", "the stores' form")


def _dali() -> Finding:
    for package in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        version = _version(package)
        if version is not None:
            return Finding("DALI", "present", f"{package} {version}", "may load samples, in the order of the backend `threads`")
    return Finding("DALI", "absent", "extra `dali` not installed", "the backend `threads` loads samples, in the same order")


def _grib() -> Finding:
    if _version("cfgrib") is None or _version("eccodes") is None:
        return Finding("GRIB", "absent", "extra `convert` not installed", "needed to convert GRIB files only")
    return Finding("GRIB", "present", f"cfgrib {_version('cfgrib')}, eccodes {_version('eccodes')}", "converts GRIB files")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
