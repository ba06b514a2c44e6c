"""Compiling the kernels: once among many processes, nothing half-made, and plain torch where it cannot be done."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.kernels.build import compiling, libraries, loading, places
from smoe_hpc.kernels.build.compilers import Compiler
from smoe_hpc.kernels.build.once import make_once

from .plants import names_alone, quick_compiler

ROOT = Path(__file__).resolve().parents[2]
MAKER = """
import sys, tempfile, time
from pathlib import Path
from smoe_hpc.errors import RunError
from smoe_hpc.kernels.build.once import make_once
path, seconds, works = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "works"
if len(sys.argv) > 4:  # begin with the others, however long each has taken to start
    others = Path(sys.argv[4])
    Path(tempfile.mkstemp(dir=others)[1])
    while len(list(others.iterdir())) < int(sys.argv[5]):
        time.sleep(0.02)
def make(work, file):
    file.write_text("half")
    time.sleep(seconds)
    if not works:
        raise RunError("the compiler's last words")
    file.write_text("whole")
try:
    print(make_once(path, make, lambda: print("made", flush=True)).read_text())
except RunError as error:
    print(error)
"""
CONVOLVE = """
import torch
from smoe_hpc.kernels import expert_conv2d
x = torch.arange(30.0).view(1, 1, 5, 6)
print(expert_conv2d(x, torch.ones(2, 1, 1, 3, 3), torch.zeros(1, 5, 6, dtype=torch.int64)).sum().item())
"""


def start(code: str, *args: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(code: str, *args: object, **environment: str) -> tuple[str, str]:
    process = start(code, *args, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture
def compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return quick_compiler(tmp_path_factory.mktemp("compiler") / "quick-compiler", monkeypatch)


# -- one makes, the others wait --------------------------------------------------------------------------------------------


def test_processes_that_come_at_once_make_it_once(tmp_path: Path):
    makers = [start(MAKER, tmp_path / "folder" / "file.so", 1, "works") for _ in range(6)]
    said = [maker.communicate(timeout=300)[0].split() for maker in makers]
    assert sorted(said) == [["made", "whole"]] + 5 * [["whole"]]


def test_those_who_wait_learn_that_it_failed(tmp_path: Path):
    (tmp_path / "started").mkdir()
    makers = [start(MAKER, tmp_path / "file.so", 1, "fails", tmp_path / "started", 4) for _ in range(4)]
    said = [maker.communicate(timeout=300)[0].splitlines() for maker in makers]
    assert all(lines[-1] == "the compiler's last words" for lines in said)
    assert sum(lines[0] == "made" for lines in said) < 4  # somebody waited
    assert not (tmp_path / "file.so").exists()
    assert output(MAKER, tmp_path / "file.so", 0, "works")[0].split() == ["made", "whole"]  # a later process tries again


def test_one_that_is_killed_leaves_no_file_and_no_lock(tmp_path: Path):
    path = tmp_path / "file.so"
    killed = start(MAKER, path, 60, "works")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "made\n"
    waiting = start(MAKER, path, 0, "works")
    time.sleep(0.5)
    assert waiting.poll() is None
    assert not path.exists()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert waiting.communicate(timeout=300)[0].split() == ["made", "whole"]


def test_who_waits_says_so_once_and_a_file_that_is_not_the_one_wanted_is_replaced(tmp_path: Path):
    path = tmp_path / "file.so"
    path.write_text("half")
    told: list[str] = []
    with path.with_suffix(".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def waits() -> None:
            told.append("waits")
            fcntl.flock(other, fcntl.LOCK_UN)

        def make(work: Path, file: Path) -> None:
            file.write_text("whole")

        def is_there(file: Path) -> bool:
            return file.read_text() == "whole"

        make_once(path, make, lambda: told.append("makes"), is_there=is_there, waits=waits)
    assert told == ["waits", "makes"]
    assert path.read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "folder").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="folder"):
        make_once(tmp_path / "folder" / "file.so", lambda work, file: None, lambda: None)


# -- the CPU's library -----------------------------------------------------------------------------------------------------


def test_it_is_compiled_once_and_says_so(compiler: Compiler, tmp_path: Path):
    first, said = output(CONVOLVE, SMOE_CACHE=str(tmp_path))
    assert said.count("smoe-hpc: compiling kernels for this processor") == 1
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()].count(".so") == 1
    second, quiet = output(CONVOLVE, SMOE_CACHE=str(tmp_path))
    assert "compiling" not in quiet
    assert first == second


def test_without_a_compiler_torch_serves_with_one_warning(tmp_path: Path):
    expected, silent = output(CONVOLVE, SMOE_KERNELS="torch")
    assert silent == ""
    found, said = output(CONVOLVE, SMOE_CACHE=str(tmp_path), CXX=str(tmp_path / "missing"))
    assert found == expected
    assert said.count("no C++ compiler runs") == 1
    assert "SMOE_KERNELS=torch" in said


def test_a_compiler_that_fails_is_quoted_and_torch_serves(compiler: Compiler, tmp_path: Path):
    script = tmp_path / "bad-compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo bad 1.0 && exit 0\necho "no such instruction" >&2\nexit 1\n')
    script.chmod(0o755)
    found, said = output(CONVOLVE, SMOE_CACHE=str(tmp_path / "cache"), CXX=str(script))
    assert found == output(CONVOLVE, SMOE_KERNELS="torch")[0]
    assert "no such instruction" in said
    assert said.count("UserWarning") == 1
    assert not list((tmp_path / "cache").rglob("*.so"))


def leave(compiler: Compiler, content: bytes) -> Path:
    """Something where the CPU's library would lie."""
    path = places.library_in(places.cpu_place(), compiler)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"", b"smoe_cpu_forward\0smoe_cpu_backward\0"], ids=["a full disk's", "a part"])
def test_a_library_without_its_entry_points_is_compiled_anew(
    content: bytes, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path))
    library = leave(compiler, content)
    assert libraries.libraries_there()[0] == []
    assert libraries.build_cpu() == library
    assert loading.load(library).smoe_cpu_use_threads
    assert libraries.libraries_there()[0] == [library]


def test_a_library_that_cannot_be_loaded_is_named_and_torch_serves(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path))
    library = leave(compiler, names_alone("cpu"))
    found, said = output(CONVOLVE + CONVOLVE)
    assert found == 2 * output(CONVOLVE, SMOE_KERNELS="torch")[0]
    assert said.count("UserWarning") == 1
    assert f"{library} cannot be loaded (" in said
    assert "; delete the file" in said
    assert "set SMOE_CACHE" in said


def test_a_cuda_library_that_cannot_be_loaded_leaves_torch_to_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from smoe_hpc.kernels.cuda import library

    (tmp_path / "c-90.so").touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(libraries, "cuda_library", lambda capability: tmp_path / "c-90.so")
    with pytest.warns(UserWarning, match=r"CUDA kernels cannot be loaded.*c-90\.so cannot be loaded"):
        assert not library.available(99)  # a device that no other test asks for: the answer is kept


def test_a_user_without_a_home_is_told_of_the_cache(monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("SMOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match="set SMOE_CACHE to a folder"):
        places.cpu_place()


def test_a_system_that_does_not_tell_a_process_its_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert compiling.cores() == os.cpu_count()


def test_a_library_made_elsewhere_serves_where_there_is_no_compiler(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path))
    made = libraries.build_cpu()
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert libraries.build_cpu() == made
    _, said = output(CONVOLVE, SMOE_CACHE=str(tmp_path), CXX=str(tmp_path / "missing"))
    assert said == ""


def test_another_processor_another_torch_or_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = places.cpu_place().folder
    assert places.cpu_place().folder == here
    (tmp_path / "cpuinfo").write_text("model\t: another\n\n")
    shutil.copytree(places.SOURCES, tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "entry.cpp").write_text("another")
    for name, value in (
        ("CPU_INFO", tmp_path / "cpuinfo"),
        ("SOURCES", tmp_path / "csrc"),
        ("CPU_FLAGS", ("-O1",)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(places, name, value)
            assert places.cpu_place().folder != here
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert places.cpu_place().folder != here


def test_other_sources_in_any_folder_are_another_library_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = places.cuda_place().folder
    shutil.copytree(places.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(places, "SOURCES", tmp_path / "csrc")
    assert places.cuda_place().folder == here
    header = tmp_path / "csrc" / "cuda" / "hopper" / "forward" / "task.cuh"
    header.write_text(header.read_text() + "// another\n")
    assert places.cuda_place().folder != here


def test_the_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SMOE_KERNELS", raising=False)
    assert libraries.native()
    monkeypatch.setenv("SMOE_KERNELS", "torch")
    assert not libraries.native()
    monkeypatch.setenv("SMOE_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="native or torch"):
        libraries.native()


# -- CUDA's library --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "serves"),
    [
        ("c-80-90", {80, 86, 89, 90}),
        ("c-86", {86, 89}),
        ("c-90", {90}),
        ("c-100", {100, 120}),
        ("c-80-100", {80, 86, 89, 100, 120}),
    ],
)
def test_which_gpus_a_library_serves(name: str, serves: set[int]):
    gpus = {80, 86, 89, 90, 100, 120}
    assert {gpu for gpu in gpus if places.serves(Path(f"{name}.so"), gpu)} == serves


@pytest.mark.skipif(libraries.find_nvcc() is None, reason="needs nvcc")
def test_cuda_code_for_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = tmp_path / "csrc" / "cuda"
    sources.mkdir(parents=True)
    shutil.copy(places.SOURCES / "cuda" / "status.cu", sources)
    kernel = 'static __global__ void k() {{ {} }}\nextern "C" int smoe_{}() {{ k<<<1, 1>>>(); return cudaGetLastError(); }}\n'
    (sources / "any.cu").write_text(kernel.format("", "any"))
    (sources / "hopper").mkdir()
    (sources / "hopper" / "any.cu").write_text(kernel.format('asm volatile("wgmma.fence.sync.aligned;");', "some"))
    monkeypatch.setattr(places, "SOURCES", tmp_path / "csrc")
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "cache"))

    def entries(library: Path) -> set[str]:
        return {name for name in ("smoe_any", "smoe_some", "smoe_error_string") if name.encode() in library.read_bytes()}

    both = libraries.build_cuda([80, 90])
    assert entries(both) == {"smoe_any", "smoe_some", "smoe_error_string"}
    assert libraries.build_cuda([90]) == libraries.build_cuda([86]) == both  # it serves these too
    later = libraries.build_cuda([120])
    assert later != both
    assert entries(later) == {"smoe_any", "smoe_error_string"}
    assert libraries.build_cuda([100]) == later
    (sources / "any.cu").write_text("not C++")
    with pytest.raises(RunError, match=r"any\.cu"):
        libraries.build_cuda([90])
    with pytest.raises(ConfigError, match=r"80 \(8\.0\) or more"):
        libraries.build_cuda([75])


def test_the_verb_builds_and_says_where(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path))
    done = CliRunner().invoke(app, ["kernels", "build", "--no-cuda"])
    assert done.exit_code == 0, done.output
    (library,) = tmp_path.rglob("*.so")
    assert str(library) in done.output.replace("\n", "")
    sources = {path.name for path in (places.SOURCES / "cpu").glob("*.cpp")}
    told = re.findall(r"^CPU kernels: (\d+)/(\d+) (\S+) \(\d+ s\)$", done.stderr, re.MULTILINE)
    files = len(sources) + 1
    assert [(int(number), int(total)) for number, total, _ in told] == [(number, files) for number in range(1, files + 1)]
    assert {name for *_, name in told} == {*sources, library.name}
    again = CliRunner().invoke(app, ["kernels", "build", "--no-cuda"])
    assert (again.exit_code, again.stderr) == (0, "")
    refused = CliRunner().invoke(app, ["kernels", "build", "--no-cpu", "--cuda", "--arch", "new"])
    assert refused.exit_code == 2
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "empty"))
    nothing = CliRunner().invoke(app, ["kernels", "build", "--no-cuda"])
    assert (nothing.exit_code, "no kernels were built" in nothing.output) == (2, True)
    assert CliRunner().invoke(app, ["kernels", "build", "--cpu", "--no-cuda"]).exit_code == 2


def test_the_verb_refuses_in_one_line(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused() -> str:
        done = CliRunner().invoke(app, ["kernels", "build", "--no-cuda"])
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert done.output.startswith("error: ")
        return done.output

    (tmp_path / "file").touch()
    for cache in (str(tmp_path / "file"), "/proc/none"):
        monkeypatch.setenv("SMOE_CACHE", cache)
        assert "set SMOE_CACHE to another folder" in refused()
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "cache"))
    leave(compiler, names_alone("cpu"))
    assert "cannot be loaded (" in refused()
    monkeypatch.setenv("CXX", '"')
    assert "CXX=" in refused()
