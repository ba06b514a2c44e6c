"""The doctor names what is there, survives what is broken, and shows the same to a person and to a program."""

import io
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from smoe_hpc.errors import SmoeError
from smoe_hpc.launch.doctor import machine as doctor


@pytest.fixture(scope="module")
def findings() -> list[doctor.Finding]:
    return doctor.inspect_machine()


def test_everything_is_looked_for(findings: list[doctor.Finding]) -> None:
    names = {finding.name.split()[0] for finding in findings}
    wanted = "Python cores memory disk torch GPU NCCL DeepSpeed MPI Slurm C++ ninja nvcc kernels HDF5 DALI GRIB"
    assert names == set(wanted.split())
    assert all(finding.value and finding.use for finding in findings)
    for name in ("Python", "torch", "DeepSpeed", "HDF5"):
        assert next(finding for finding in findings if finding.name == name).state == "used"


def test_table_and_json_say_the_same(findings: list[doctor.Finding]) -> None:
    page = Console(width=1000, file=io.StringIO())
    page.print(doctor.render(findings))
    assert isinstance(page.file, io.StringIO)
    shown = page.file.getvalue()
    told = [asdict(finding) for finding in findings]
    assert len(told) == len(findings)
    for finding in told:
        assert finding["value"] in shown
        assert finding["use"] in shown


def test_brackets_are_no_markup() -> None:
    page = Console(width=200, file=io.StringIO())
    page.print(doctor.render([doctor.Finding("x", "used", "[red]a[/red]", "b")]))
    assert isinstance(page.file, io.StringIO)
    assert "[red]a[/red]" in page.file.getvalue()


def test_an_empty_path_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = {finding.name: finding for finding in doctor.inspect_machine()}
    assert found["C++ compiler"].state == "problem"
    assert "install g++ or set CXX" in found["C++ compiler"].use
    assert found["Slurm"].state == "absent"
    assert found["MPI"].state in ("absent", "problem")


def test_a_broken_library_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Finding:
        raise OSError("libhdf5.so: not found")

    monkeypatch.setattr(doctor, "_hdf5", broken)
    found = {finding.name: finding for finding in doctor.inspect_machine()}
    assert found["HDF5"].state == "problem"
    assert "libhdf5.so: not found" in found["HDF5"].value


def test_two_mpis_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_line(*command: str) -> str:
        return "mpirun (Open MPI) 4.1.4" if command[0] == "mpirun" else "MPICH Version: 5.0.2"

    monkeypatch.setattr(doctor, "first_line", first_line)
    found = {finding.name: finding for finding in doctor.inspect_machine()}["MPI"]
    assert found.state == "problem"
    assert "two different MPIs" in found.use


def test_states_are_checked() -> None:
    with pytest.raises(SmoeError, match="not 'fine'"):
        doctor.Finding("x", "fine", "a", "b")
