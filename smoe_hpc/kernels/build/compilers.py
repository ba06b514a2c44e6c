"""The compilers of this machine and their versions."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from smoe_hpc.errors import ConfigError

_PATIENCE = 60  # seconds for a compiler to print its version


@dataclass(frozen=True)
class Compiler:
    """A compiler that runs.

    Args:
        command: its path, and arguments that always go with it.
        version: what ``--version`` prints.
    """

    command: tuple[str, ...]
    version: str


def find_cxx() -> Compiler | None:
    """The C++ compiler: ``$CXX``, else g++, else c++; None where none of them runs.

    Raises:
        ConfigError: ``$CXX`` is no command.
    """
    chosen = os.environ.get("CXX")
    if not chosen:
        return _first_that_runs([["g++"], ["c++"]])
    try:
        command = shlex.split(chosen)
    except ValueError as error:
        raise ConfigError(f"CXX={chosen!r} is no command ({error}); set it to one such as g++, or unset it") from None
    if not command:
        raise ConfigError(f"CXX={chosen!r} names no compiler; set it to one such as g++, or unset it")
    return _first_that_runs([command])


def find_nvcc() -> Compiler | None:
    """CUDA's compiler: in ``$CUDA_HOME/bin``, else on the PATH, else in /usr/local/cuda/bin; None where none runs."""
    home = os.environ.get("CUDA_HOME")
    return _first_that_runs([*([[f"{home}/bin/nvcc"]] if home else []), ["nvcc"], ["/usr/local/cuda/bin/nvcc"]])


def _first_that_runs(commands: Sequence[Sequence[str]]) -> Compiler | None:
    for command in commands:
        path = shutil.which(command[0])
        if path is None:
            continue
        asked = [path, *command[1:], "--version"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, errors="replace", check=False, timeout=_PATIENCE)
        except (OSError, subprocess.TimeoutExpired):  # not a program of this machine, or one that waits for input
            continue
        if done.returncode == 0:
            return Compiler((path, *command[1:]), done.stdout.strip())
    return None
