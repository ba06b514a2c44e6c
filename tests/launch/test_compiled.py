"""The doctor's rows about the compiled kernels: compiler, switch, and what lies in the cache."""

from pathlib import Path

import pytest

from smoe_hpc.kernels.build import libraries
from smoe_hpc.kernels.build.places import library_in
from smoe_hpc.launch.doctor import compiled

from ..kernels.plants import names_alone, plant


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path))
    for variable in ("SMOE_KERNELS", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def library() -> Path:
    """One whose entry points do nothing, where the CPU's would lie."""
    compiler = libraries.find_cxx()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = library_in(libraries.cpu_place(), compiler)
    plant(path, path.with_suffix(".loaded"), compiler)
    return path


def test_an_empty_cache(own_cache: Path) -> None:
    found = compiled.kernels_finding()
    assert found.state == "absent"
    assert found.value == f"SMOE_KERNELS not set; in {own_cache / 'kernels'}: no CPU library, no CUDA library"


def test_what_lies_ready_is_named(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    folder = libraries.cuda_place().folder
    folder.mkdir(parents=True)
    monkeypatch.setattr(libraries, "find_nvcc", lambda: None)  # where any compiler's serves
    (folder / "c-80-90.so").write_bytes(names_alone("cuda"))
    found = compiled.kernels_finding()
    assert found.state == "used"
    assert found.value.endswith(f"CPU library {library.name}, CUDA library c-80-90.so")


def test_a_library_that_cannot_be_loaded_is_a_problem(library: Path) -> None:
    library.write_bytes(names_alone("cpu"))
    found = compiled.kernels_finding()
    assert found.state == "problem"
    assert "delete it, or set SMOE_CACHE" in found.use


def test_a_library_that_another_user_could_write_is_a_problem_and_is_not_loaded(library: Path) -> None:
    assert compiled.kernels_finding().state == "used"
    marker = library.with_suffix(".loaded")
    marker.unlink()
    library.parent.chmod(0o777)
    found = compiled.kernels_finding()
    assert found.state == "problem"
    assert found.use.startswith(f"{library.parent} is writable by everybody: nothing is loaded from there")
    assert library.name not in found.value
    assert not marker.exists()


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
