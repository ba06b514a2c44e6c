"""Results beside data and in the user's cache are read where nobody can have put them there who could not change the data."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.files import caches
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.cache import cache_file, keep
from smoe_hpc.io.statistics.channel_statistics import Statistics, statistics_of

MARCH = Split("2019-03-01/2019-03-02")
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(caches, "_told", set())
    before = os.umask(0o022)
    yield
    os.umask(before)


def forge(path: Path) -> None:
    """Another user's idea of what the means are."""
    found = Statistics.load(path)
    replace(found, mean=tuple(mean + 1e9 for mean in found.mean)).save(path)
    os.chown(path, NOBODY, -1)


@as_root
def test_statistics_that_another_user_put_beside_the_data_are_not_believed(make_store, tmp_path: Path):
    (tmp_path / "data").mkdir()
    store, _ = make_store(name="data/store.h5", count=50)
    right = statistics_of(store, MARCH)
    (kept,) = (tmp_path / "data" / "statistics").iterdir()
    forge(kept)
    with pytest.warns(UserWarning, match=r"belongs to user .*, who cannot change the data: .* is not used, .* serves instead"):
        assert statistics_of(store, MARCH) == right
    assert [path.name for path in (tmp_path / "cache" / "statistics").iterdir()] == [kept.name]
    os.chown(store.path, NOBODY, -1)  # now they are of whoever made the data
    assert statistics_of(store, MARCH) != right
    assert cache_file(store, "statistics", [MARCH.text, ("t2m", "z500")], ".json") == kept


def test_a_cache_for_everybody_leads_to_a_private_one(make_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, _ = make_store(count=50)
    monkeypatch.setattr("smoe_hpc.io.statistics.cache._can_write", lambda folder: False)
    shared = tmp_path / "cache" / "statistics"
    right = statistics_of(store, MARCH)
    (kept,) = shared.iterdir()
    shared.chmod(0o1777)
    with pytest.warns(UserWarning, match=f"{shared} is writable by everybody: what lies there is not used") as warned:
        assert [statistics_of(store, MARCH) for _ in range(2)] == [right, right]
    assert len(warned) == 1
    assert (tmp_path / "own" / "smoe-hpc" / "private" / "statistics" / kept.name).exists()


@pytest.mark.parametrize(
    ("mode", "umask", "folder", "file"),
    [
        (0o755, 0o000, 0o755, 0o644),  # nobody gets in who could not before
        (0o2775, 0o002, 0o2775, 0o664),  # a group's data stay the group's
        (0o2775, 0o022, 0o2775, 0o644),
        (0o1777, 0o000, 0o755, 0o644),
    ],
)
def test_who_may_write_to_a_result_may_write_to_the_data(tmp_path: Path, mode: int, umask: int, folder: int, file: int):
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(mode)
    os.umask(umask)
    path = data / "statistics" / "file.json"
    keep(path, lambda path: path.touch(), data)
    assert (stat.S_IMODE(path.parent.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (folder, file)


def test_what_cannot_be_written_says_so(tmp_path: Path):
    def save(path: Path) -> None:
        raise DataError(f"cannot write {path}")

    with pytest.raises(DataError, match="cannot write"):
        keep(tmp_path / "none" / "statistics" / "file.json", save, tmp_path / "none")
