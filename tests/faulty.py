"""Processes whose file systems have no locks, or cannot be read."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")


def environment(folder: Path, **numbers: int) -> dict[str, str]:
    """Of a process in which locks or reads fail.

    Args:
        folder: where the library is built.
        numbers: of the errors, as in `errno`: ``lock=`` of those that locks meet, ``read=`` of those that reads meet.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, to build what makes locks and reads fail")
    library = folder / "faulty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    set_now = {f"SMOE_TEST_{kind.upper()}_ERRNO": str(number) for kind, number in numbers.items()}
    return {**os.environ, "LD_PRELOAD": str(library), **set_now}
