"""Libraries that somebody has left where ours would lie: without code, or with code of another user."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from smoe_hpc.kernels.build import libraries, places
from smoe_hpc.kernels.build.compilers import Compiler

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")


def names_alone(room: str) -> bytes:
    """What passes for a library of ours as long as it is not loaded."""
    texts = "".join(path.read_text() for path in sorted((places.SOURCES / room).rglob("*.c*")))
    return "\0".join(["", *re.findall(r"smoe_\w+", texts), ""]).encode()


def plant(library: Path, marker: Path, compiler: Compiler) -> None:
    """A library that has our entry points, and leaves a mark where it is loaded."""
    library.parent.mkdir(parents=True, exist_ok=True)
    entries = "".join(
        f'extern "C" int {name}(void*) {{ return 0; }}\n'
        for name in ("smoe_cpu_forward", "smoe_cpu_backward", "smoe_cpu_use_threads")
    )
    mark = f'#include <fcntl.h>\n__attribute__((constructor)) void mark() {{ creat("{marker}", 0644); }}\n'
    command = [*compiler.command, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=mark + entries, text=True, check=True)


def quick_compiler(path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """The C++ compiler, told not to optimise; where there is none, the test is skipped."""
    found = libraries.find_cxx()
    if found is None:
        pytest.skip("needs a C++ compiler")
    stand_in(path, f'exec {found.command[0]} "$@" -O0', monkeypatch)
    quick = libraries.find_cxx()
    assert quick is not None
    return quick


def stand_in(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that does what it is told here."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\n{body}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
