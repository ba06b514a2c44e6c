"""Which compiler is found: the one that is named or the first that runs, and a clear error where a name is no command."""

from pathlib import Path

import pytest

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels.build import compilers
from smoe_hpc.kernels.build.compilers import Compiler, find_cxx


def make_program(path: Path, does: str) -> None:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("chosen", "message"), [('"', "is no command"), (" ", "names no compiler")])
def test_a_variable_that_names_no_compiler(chosen: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", chosen)
    with pytest.raises(ConfigError, match=f"CXX=.* {message}"):
        find_cxx()


def test_what_is_no_program_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "g++").write_bytes(b"\x7fno program of this machine")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert find_cxx() is None


def test_the_first_that_runs_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_cxx() is None
    make_program(tmp_path / "c++", "echo some compiler 1.0")
    assert find_cxx() == Compiler((str(tmp_path / "c++"),), "some compiler 1.0")
    make_program(tmp_path / "g++", "exit 1")
    assert find_cxx() == Compiler((str(tmp_path / "c++"),), "some compiler 1.0")
    monkeypatch.setenv("CXX", "c++ -pipe")
    assert find_cxx() == Compiler((str(tmp_path / "c++"), "-pipe"), "some compiler 1.0")


def test_one_that_waits_for_something_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_program(tmp_path / "g++", "exec sleep 60")
    monkeypatch.setattr(compilers, "_PATIENCE", 0.2)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert find_cxx() is None
