from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

from smoe_hpc.launch.rendezvous import free_port

from .toy_runs import stopped, whole  # noqa: F401

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # torch's own diary of each tensor saved
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Launch(Protocol):
    def __call__(
        self, script: str, *arguments: object, processes: int = 1, check: bool = True, gpus: str = ""
    ) -> subprocess.CompletedProcess[str]: ...


def environment(gpus: str = "") -> dict[str, str]:
    """Of a process that sees these GPUs ("0,1"), by default none."""
    not_ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "DS_ACCELERATOR")
    kept = {key: value for key, value in os.environ.items() if key not in not_ours}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    accelerator = {} if gpus else {"DS_ACCELERATOR": "cpu"}
    return {**kept, **accelerator, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": gpus}


def start_two_ranks(script: str, *arguments: object, **variables: str) -> list[subprocess.Popen[str]]:
    """Start a script of this folder as two processes without a launcher, which would end one that the other has left."""
    address = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [sys.executable, "-m", f"tests.training.{script}", *map(str, arguments)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    given = {**environment(), **address, **variables}
    return [subprocess.Popen(started, env={**given, **rank}, stderr=subprocess.PIPE, text=True) for rank in own]


def command(script: str, *arguments: object, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(HERE / script), *map(str, arguments)]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a script of this folder in processes of its own."""

    def run(
        script: str, *arguments: object, processes: int = 1, check: bool = True, gpus: str = ""
    ) -> subprocess.CompletedProcess[str]:
        started = command(script, *arguments, processes=processes)
        done = subprocess.run(started, env=environment(gpus), capture_output=True, text=True, timeout=180)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run
