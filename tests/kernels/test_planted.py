"""Another user's library is not loaded: a private folder serves instead, and says so once."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.files import caches
from smoe_hpc.kernels.build import libraries, loading
from smoe_hpc.kernels.build.compilers import Compiler
from smoe_hpc.kernels.build.places import library_in

from .plants import NOBODY, as_root, plant, quick_compiler, stand_in

ROOT = Path(__file__).resolve().parents[2]
CONVOLVE = """
import torch
from smoe_hpc.kernels import expert_conv2d
x = torch.arange(30.0).view(1, 1, 5, 6)
print(expert_conv2d(x, torch.ones(2, 1, 1, 3, 3), torch.zeros(1, 5, 6, dtype=torch.int64)).sum().item())
"""


class Cache:
    """A folder that a centre gave to everybody, with a library in it, and the user's own cache."""

    def __init__(self, folder: Path, compiler: Compiler) -> None:
        self.compiler = compiler
        self.shared, self.own, self.marker = folder / "shared", folder / "own", folder / "loaded"
        self.private = self.own / "smoe-hpc" / "private" / "kernels"
        self.own.mkdir(mode=0o700)
        self.shared.mkdir()
        self.shared.chmod(0o1777)
        self.library = library_in(libraries.cpu_place(), compiler)
        plant(self.library, self.marker, compiler)


def give_away(*paths: Path) -> None:
    for path in paths:
        os.chown(path, NOBODY, NOBODY)


def convolve() -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", CONVOLVE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    compiler = quick_compiler(tmp_path / "quick-compiler", monkeypatch)
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(caches, "_told", set())
    return Cache(tmp_path, compiler)


@as_root
def test_a_planted_library_does_not_run(cache: Cache):
    """All of it another user's, in a folder where everybody may make files."""
    give_away(cache.library, cache.library.parent, cache.library.parent.parent)
    found, said = convolve()
    assert not cache.marker.exists()
    assert found.split() == ["3016.0"]
    assert said.count("UserWarning") == 1
    assert f"{cache.shared / 'kernels'} belongs to user " in said
    assert f"{cache.private / cache.library.parent.name} serves instead" in said
    (made,) = cache.private.rglob("*.so")
    again, said = convolve()
    assert again == found
    assert (said.count("UserWarning"), "compiling" in said) == (1, False)
    assert not cache.marker.exists()
    for folder in (cache.private.parent, cache.private, made.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_wherever_others_may_write_on_the_way_they_could_put_another_library(cache: Cache):
    for writable in (cache.library, cache.library.parent, cache.library.parent.parent):
        before = writable.stat().st_mode
        writable.chmod(0o777)
        with pytest.raises(RunError, match=f"is not loaded, since {writable} is writable by everybody"):
            loading.load(cache.library)
        place = libraries.cpu_place()
        assert place.folder == cache.private / cache.library.parent.name
        assert place.instead == f"{writable} is writable by everybody"
        writable.chmod(before)
    assert libraries.cpu_place().folder == cache.library.parent
    assert not cache.marker.exists()


@as_root
def test_a_foreign_library_in_a_folder_of_ones_own(cache: Cache):
    give_away(cache.library)
    assert libraries.cpu_place().folder == cache.private / cache.library.parent.name
    with pytest.raises(RunError, match=f"is not loaded, since {cache.library} belongs to user"):
        loading.load(cache.library)
    assert not cache.marker.exists()


def test_what_a_centre_has_prepared_is_used(cache: Cache):
    """It belongs to root (or, here, to the user), and nobody else may write: below a folder for all."""
    assert libraries.build_cpu() == cache.library
    loading.load(cache.library)
    assert cache.marker.exists()


def test_one_warning_for_both_kinds_of_kernels(cache: Cache):
    (cache.shared / "kernels").chmod(0o777)
    with pytest.warns(UserWarning, match="is writable by everybody: what lies there is not used") as warned:
        assert [place.warn().parent for place in (libraries.cpu_place(), libraries.cuda_place())] == 2 * [cache.private]
    assert len(warned) == 1


@as_root
def test_a_name_among_temporary_files_that_can_be_guessed_is_looked_at_too(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    monkeypatch.setattr(caches.tempfile, "tempdir", str(temporary))
    for folder in (cache.shared / "kernels", cache.own):
        folder.chmod(0o777)
    guessed = temporary / f"smoe-hpc-{os.geteuid()}"
    assert libraries.cpu_place().folder == guessed / "kernels" / cache.library.parent.name
    guessed.mkdir()
    give_away(guessed)
    with pytest.raises(ConfigError, match="there is no private folder either; set SMOE_CACHE to a folder of your own"):
        libraries.cpu_place()


def test_folders_and_libraries_are_the_users_alone_whatever_the_umask(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMOE_CACHE", str(cache.own / "new"))
    before = os.umask(0)
    try:
        library = libraries.build_cpu()
    finally:
        os.umask(before)
    for path in (library, *[path for path in library.parents if cache.own in path.parents]):
        assert not path.stat().st_mode & 0o022, path
    assert libraries.cpu_place().instead is None
    loading.load(library)


def test_temporary_files_of_compilers_have_a_folder_of_their_own(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Below /tmp some of them have names that can be guessed."""
    stand_in(tmp_path / "compiler", f'echo "$TMPDIR" >>{tmp_path}/used\nexit 1', monkeypatch)
    monkeypatch.setenv("SMOE_CACHE", str(cache.own))
    with pytest.raises(RunError, match="ended with status 1"):
        libraries.build_cpu()
    used = set((tmp_path / "used").read_text().split())
    assert {Path(folder).parent for folder in used} == {libraries.cpu_place().folder}
    assert all(Path(folder).name.startswith("making-") for folder in used)


def test_a_disk_that_fills_up_while_compiling_is_one_line(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path / "compiler", 'printf "Assembler:\\nFatal error: No space left on device\\n" >&2\nexit 1', monkeypatch)
    with pytest.raises(ConfigError, match=r"no space is left in .*; free some, or set SMOE_CACHE to another folder") as told:
        libraries.build_cpu()
    assert "\n" not in str(told.value)
    assert not list(libraries.cpu_place().folder.glob("making-*"))
