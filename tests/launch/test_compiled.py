"""The doctor's rows about the compiled kernels: compiler, switch, and what lies in the cache."""

import os
import subprocess
from pathlib import Path

import pytest

from smoe_hpc.kernels import build
from smoe_hpc.launch import compiled


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path))
    for variable in ("SMOE_KERNELS", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def library() -> Path:
    """One without kernels, where the CPU's would lie."""
    compiler = build.find_cxx()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = build._cpu_folder() / f"{build._digest(compiler)}.so"
    path.parent.mkdir(parents=True)
    subprocess.run([*compiler.command, "-shared", "-x", "c++", os.devnull, "-o", str(path)], check=True)
    return path


def test_an_empty_cache(own_cache: Path) -> None:
    found = compiled.kernels_finding()
    assert found.state == "absent"
    assert found.value == f"SMOE_KERNELS not set; in {own_cache / 'kernels'}: no CPU library, no CUDA library"


def test_what_lies_ready_is_named(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    folder = build._cuda_folder()
    folder.mkdir(parents=True)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)  # where any compiler's serves
    (folder / "c-80-90.so").touch()
    found = compiled.kernels_finding()
    assert found.state == "used"
    assert found.value.endswith(f"CPU library {library.name}, CUDA library c-80-90.so")


def test_a_library_that_cannot_be_loaded_is_a_problem(library: Path) -> None:
    library.write_bytes(b"")
    found = compiled.kernels_finding()
    assert found.state == "problem"
    assert "delete it, or set SMOE_CACHE" in found.use


def test_the_switch_decides_what_compilers_are_for(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    assert "at their first use" in compiled.cxx_finding().use
    monkeypatch.setenv("SMOE_KERNELS", "torch")
    assert compiled.cxx_finding().state == compiled.kernels_finding().state == "present"
    assert "first use" not in compiled.cxx_finding().use
    assert compiled.kernels_finding().value.startswith("SMOE_KERNELS=torch; ")
    monkeypatch.setenv("CXX", "/none/g++")
    assert compiled.cxx_finding().state == "absent"


@pytest.mark.parametrize(("variable", "value"), [("SMOE_KERNELS", "fast"), ("CXX", '"'), ("CXX", " ")])
def test_a_wrong_setting_is_a_problem(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    found = compiled.kernels_finding()
    assert found.state == "problem"
    assert found.use.startswith(f"{variable}={value!r}")
    assert compiled.cxx_finding().state == ("problem" if variable == "CXX" else "used")
