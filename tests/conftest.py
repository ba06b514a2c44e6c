"""What every test shares: one thread, the folders of files that are not in the repository, and reasons to skip."""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Files and folders whose tests start processes, compile or train: all of them are marked slow.
SLOW = (
    *("bench", "experiments", "slurm", "report", "tasks/test_finds_regions.py", "tasks/test_weather_training.py", "jobs"),
    *("io/loading/dali/test_backend.py", "io/synthetic/test_era5_writing.py", "io/loading/test_loader.py"),
    *("io/statistics/test_beside.py", "io/access/test_open_files.py", "inference", "docs", "test_whole_way.py"),
    *("cli/test_forecast.py", "cli/test_figures.py", "tasks/test_other_data.py"),
    *("kernels/test_build.py", "kernels/test_cpu_edges.py", "kernels/test_ops.py", "kernels/test_planted.py"),
    *("launch/test_interfaces.py", "launch/test_rendezvous.py"),
    *("launch/test_communicator.py", "layers/test_spatial_moe.py", "layers/test_steps_of_processes.py"),
    *("layers/test_tracing.py",),
    *("training", "cli/test_hints.py", "cli/test_jobs.py", "cli/test_paths.py", "cli/test_processes.py"),
    *("cli/test_data_jobs.py", "test_lockless.py"),
)
torch.set_num_threads(1)


def _folder(variable: str, name: str) -> Path:
    return Path(os.environ.get(variable) or ROOT.parent / "shared" / name)


def _installed() -> set[str]:
    return {distribution.name.lower() for distribution in importlib.metadata.distributions()}


@functools.cache
def _reason_to_skip(marker: str) -> str | None:
    """Why tests with this marker cannot run here, or None where they can."""
    if marker == "gpu":
        return None if torch.cuda.is_available() else "needs a CUDA GPU"
    if marker == "multigpu":
        return None if torch.cuda.device_count() > 1 else "needs several CUDA GPUs"
    if marker == "slurm":
        return None if shutil.which("slurmctld") else "needs Slurm's daemons (Debian: slurm-wlm munge)"
    if marker == "mpi":
        there = shutil.which("mpirun") and importlib.util.find_spec("mpi4py")
        return None if there else "needs mpirun and mpi4py (Debian: openmpi-bin)"
    if marker == "dali":
        there = any(name.startswith("nvidia-dali") for name in _installed())
        return None if there else "needs nvidia-dali (extra dali)"
    if marker == "golden":
        there = next(_folder("SMOE_GOLDEN", "golden").glob("layer_*.npz"), None)
        return None if there else "needs the vectors of the authors' layer (SMOE_GOLDEN=folder)"
    if marker == "real_data":
        there = next(_folder("SMOE_REAL_DATA", "data").glob("*.grib"), None)
        return None if there else "needs a file of real data (SMOE_REAL_DATA=folder)"
    return None


def _is_slow(path: Path) -> bool:
    own = path.relative_to(ROOT / "tests")
    return any(one.as_posix() in SLOW for one in (own, *own.parents))


@pytest.hookimpl(tryfirst=True)  # before pytest picks by markers (-m)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item.path):
            item.add_marker(pytest.mark.slow)
        for marker in item.iter_markers():
            reason = _reason_to_skip(marker.name)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def _ends_its_process_group() -> Iterator[None]:
    """What a file's tests trained in this process leaves no variables to processes that later tests start."""
    yield
    rendezvous = sys.modules.get("smoe_hpc.launch.rendezvous")
    if rendezvous is not None:
        rendezvous.shutdown()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of layer_*.npz, made with the authors' layer; for tests marked golden."""
    return _folder("SMOE_GOLDEN", "golden")


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder of real GRIB files; for tests marked real_data."""
    return _folder("SMOE_REAL_DATA", "data")
