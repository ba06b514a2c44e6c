"""A Slurm of two nodes for the tests, started by the script that a person would use, and stopped at the end."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOCAL_SLURM = ROOT / "launch" / "local_slurm.sh"
LAUNCHERS = ("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "TORCHELASTIC_", "SUBMITIT_")
CPU_OPTIONS = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any launcher's variables, with the checkout to import from."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, "SMOE_"))}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    return {**environ, "OMP_NUM_THREADS": "1", **more}


@dataclass
class Slurm:
    """The commands of one Slurm."""

    conf: str

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints."""
        environ = clean_environment(SLURM_CONF=self.conf, **variables)
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def sbatch(self, script: Path | str, cwd: Path, *options: str, **variables: str) -> str:
        """Submit a script for the CPUs; the job's number. Its log is ``cwd/log``."""
        return self.run("sbatch", "--parsable", "--output=log", *CPU_OPTIONS, *options, str(script), cwd=cwd, **variables)

    def about(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, states: tuple[str, ...], seconds: float = 120) -> Mapping[str, str]:
        """Wait until a job is in one of the states."""
        wait_until(lambda: self.about(job)["JobState"] in states, seconds, lambda: f"job {job}: {self.about(job)}")
        return self.about(job)


def wait_until(condition: Callable[[], bool], seconds: float, describe: Callable[[], str] = lambda: "") -> None:
    """Wait; a failure says what was there instead."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s; {describe()}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes on this machine, for this worker alone; skipped where they cannot be had."""
    folder = Path(tempfile.mkdtemp(prefix="smoe-slurm-"))  # short: a socket's name must not be long
    environ = clean_environment(SMOE_SLURM_DIR=str(folder), SMOE_SLURM_FORCE="1")

    def script(verb: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(LOCAL_SLURM), verb], env=environ, capture_output=True, text=True, timeout=300)

    up = script("up")
    if up.returncode != 0:
        shutil.rmtree(folder)
        pytest.skip(f"no local Slurm: {up.stderr.strip()}")
    try:
        yield Slurm(up.stdout.strip().removeprefix("export SLURM_CONF="))
    finally:
        down = script("down")
        assert down.returncode == 0, down.stderr
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def environment_script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For SMOE_ENV: a script that leads to the interpreter of the tests."""
    path = tmp_path_factory.mktemp("environment") / "activate.sh"
    path.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    return str(path)
