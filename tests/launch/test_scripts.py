"""The scripts a person starts: clean shell, and one clear line for whatever is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = ROOT / "launch" / "environment.sh"


def bash(script: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script that reads environment.sh; ``folders`` go first on PATH, as the place of stand-ins."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SMOE_")}
    environ["PATH"] = os.pathsep.join([*map(str, folders), environ["PATH"]])
    environ.update(variables)
    command = ["bash", "-euo", "pipefail", "-c", f". {ENVIRONMENT}; {script}"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program that only says what it is told to."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian: shellcheck)")
def test_shellcheck() -> None:
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_started() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for script in ("quickstart.sh", "test.sh", "local_slurm.sh"):
        assert os.access(ROOT / "launch" / script, os.X_OK)


def test_an_interpreter_that_has_everything() -> None:
    done = bash('prepare test; echo "$PYTHON $PYTHONPATH"', SMOE_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert f"{sys.executable} has everything" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{sys.executable} {ROOT}")


def test_no_such_interpreter() -> None:
    assert_one_line(bash("prepare", SMOE_PYTHON="/no/such/python"), "SMOE_PYTHON=/no/such/python does not exist")


def test_the_home_folder_in_variables(tmp_path: Path) -> None:
    named = {"SMOE_VENV": "~/my venv", "SMOE_PYTHON": "~/bin/python", "SMOE_TORCH": "torch==2.13", "HOME": str(tmp_path)}
    done = bash('echo "$VENV:$SMOE_PYTHON:$SMOE_TORCH"', **named)
    assert done.stdout == f"{tmp_path}/my venv:{tmp_path}/bin/python:torch==2.13\n", done.stderr
    assert_one_line(bash("prepare", SMOE_VENV="~no_such_user/venv"), "SMOE_VENV=~no_such_user/venv", "no home folder")


def test_an_interpreter_that_is_too_old(tmp_path: Path) -> None:
    stand_in(tmp_path, "python3.6", "exit 1")
    done = bash("prepare", SMOE_PYTHON=str(tmp_path / "python3.6"))
    assert_one_line(done, "is no Python from 3.10 to 3.14", "unset it")


def test_the_distributions_own_python_is_not_installed_into() -> None:
    system = Path("/usr/bin/python3")
    if not any(Path("/usr/lib").glob("python3.*/EXTERNALLY-MANAGED")):
        pytest.skip("this distribution lets pip install into its own Python")
    done = bash("add() { echo installed; }; prepare", SMOE_PYTHON=str(system))
    assert_one_line(done, "SMOE_PYTHON=/usr/bin/python3", "unset")
    assert "installed" not in done.stdout
    done = bash("needs() { echo torch; }; add() { echo installed; }; prepare", SMOE_PYTHON=str(system))
    assert_one_line(done, "is the distribution's own Python", "name the interpreter of an environment", "unset SMOE_PYTHON")
    assert "installed" not in done.stdout
    assert bash(f"PYTHON={sys.executable}; may_install").returncode == 0


def test_no_disk(tmp_path: Path) -> None:
    done = bash("prepare", SMOE_VENV=str(tmp_path / "venv"), SMOE_MIN_FREE_MIB="999999999")
    assert_one_line(done, "MiB are free at", "installing needs 999999999 MiB", "SMOE_VENV")
    assert not (tmp_path / "venv").exists()


def test_no_compiler() -> None:
    # the tests run as whoever they run as: without root, nothing is installed
    done = bash("is_root() { false; }; prepare", CXX="no-such-compiler")
    assert_one_line(done, "no C++ compiler (no-such-compiler)", "g++")


def test_no_python(tmp_path: Path) -> None:
    done = bash("is_root() { false; }; suits() { false; }; prepare", SMOE_VENV=str(tmp_path / "venv"))
    assert_one_line(done, "no Python from 3.10 to 3.14", "SMOE_PYTHON")


def test_a_python_without_venv(tmp_path: Path) -> None:
    done = bash("is_root() { false; }; makes_venvs() { false; }; prepare", SMOE_VENV=str(tmp_path / "venv"))
    assert_one_line(done, "cannot make environments", "-venv")


def test_no_network(tmp_path: Path) -> None:
    script = "add() { echo 'Failed to establish a new connection' >&2; return 1; }; install_torch"
    done = bash(f"PYTHON={sys.executable}; {script}", TMPDIR=str(tmp_path))
    assert_one_line(done, "no network", "log: ")


def test_a_disk_that_fills_up_while_installing(tmp_path: Path) -> None:
    script = "add() { echo 'OSError: [Errno 28] No space left on device' >&2; return 1; }; install_torch"
    assert_one_line(bash(f"PYTHON={sys.executable}; {script}", TMPDIR=str(tmp_path)), "the disk is full", "TMPDIR")


@pytest.mark.parametrize(
    ("driver", "variables", "expected"),
    [
        (None, {}, ["torch==2.13.0+cpu"]),
        ("13.0", {}, ["torch==2.13.0"]),
        ("13.2", {}, ["torch==2.13.0"]),
        ("12.4", {}, ["uv", "uv --torch-backend auto"]),
        ("12.4", {"SMOE_TORCH": "torch==2.11.0"}, ["torch==2.11.0"]),
    ],
)
def test_torch_fits_the_driver(tmp_path: Path, driver: str | None, variables: dict[str, str], expected: list[str]) -> None:
    table = f'if [ "${{1:-}}" = -L ]; then echo "GPU 0: NVIDIA"; else echo "| Driver 1.2  CUDA Version: {driver}  |"; fi'
    stand_in(tmp_path / "bin", "nvidia-smi", table if driver else "exit 9")
    said = tmp_path / "said"
    stand_in(tmp_path / "bin", "python", f'[ "$2" = uv ] && echo "uv $7 $8" >>{said}; exit 0')
    script = f'PYTHON={tmp_path}/bin/python; add() {{ echo "$@" >>{said}; }}; install_torch'
    done = bash(script, tmp_path / "bin", TMPDIR=str(tmp_path), **variables)
    assert done.returncode == 0, done.stderr
    assert said.read_text().splitlines() == expected


def test_the_last_resort_for_a_cpu_build(tmp_path: Path) -> None:
    """No CPU build in pip's reach, and none by uv: the default one, with a word on its size."""
    stand_in(tmp_path / "bin", "nvidia-smi", "exit 9")
    script = 'PYTHON=false; add() { [[ "$*" == "torch==2.13.0" || "$*" == "uv" ]]; }; install_torch'
    done = bash(script, tmp_path / "bin", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "several GB of CUDA libraries" in done.stdout


def test_no_registry_is_named() -> None:
    for path in (*ROOT.glob("launch/*"), ROOT / "setup.cfg", ROOT / "pyproject.toml"):
        if path.is_file():
            assert "://" not in path.read_text(), path


def test_the_log_has_a_name_that_nobody_can_guess(tmp_path: Path) -> None:
    found = [bash('echo "$LOG"', TMPDIR=str(tmp_path)).stdout.strip() for _ in range(2)]
    assert found[0] != found[1]
    for name in found:
        assert re.fullmatch(rf"{tmp_path}/smoe-install-\w{{12}}\.log", name)
    assert list(tmp_path.iterdir()) == []  # made when there is something to say


def local_slurm(verb: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "local_slurm.sh"), verb]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("S")}
    return subprocess.run(command, env={**environ, **variables}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("verb", ["up", "status", "down"])
def test_the_local_slurm_takes_nothing_from_a_folder_that_others_may_write(verb: str, tmp_path: Path) -> None:
    state = tmp_path / f"smoe-slurm-{os.getuid()}"
    state.mkdir()
    state.chmod(0o777)
    done = local_slurm(verb, TMPDIR=str(tmp_path), SMOE_SLURM_FORCE="1")
    assert_one_line(done, f"others may write in {state}", "SMOE_SLURM_DIR")
    assert list(state.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make files of another user")
def test_the_local_slurm_takes_nothing_from_another_user(tmp_path: Path) -> None:
    state = tmp_path / f"smoe-slurm-{os.getuid()}"
    own = tmp_path / "own"
    own.mkdir()
    state.symlink_to(own)
    assert local_slurm("status", TMPDIR=str(tmp_path)).returncode == 3  # the user's own link
    os.chown(state, 65534, -1, follow_symlinks=False)
    assert_one_line(local_slurm("up", TMPDIR=str(tmp_path), SMOE_SLURM_FORCE="1"), f"{state} belongs to ")
    state.unlink()
    state.mkdir()
    os.chown(state, 65534, -1)
    assert_one_line(local_slurm("down", TMPDIR=str(tmp_path)), f"{state} belongs to ")
    assert list(own.iterdir()) == []
