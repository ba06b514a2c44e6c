"""What another user may have put there is told from what only this user and root can have."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from smoe_hpc.files import trust
from smoe_hpc.files.trust import Reader, added, fault, trusted

ME, EVE, NOBODY = 1000, 1001, 65534
FOLDER, FILE, LINK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")


@pytest.fixture(autouse=True)
def wide_umask():
    """Modes are set here, not taken from who runs the tests."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("kind", "mode", "uid", "gid", "above", "said"),
    [
        (FILE, 0o644, ME, 50, False, None),
        (FILE, 0o755, 0, 0, False, None),  # a centre's
        (FILE, 0o644, EVE, 50, False, "belongs to user 1001"),
        (FILE, 0o664, ME, 50, False, "is writable by its group"),
        (FILE, 0o664, ME, ME, False, None),  # the user's group of one
        (FILE, 0o666, ME, ME, False, "is writable by everybody"),
        (FOLDER, 0o700, ME, 50, False, None),
        (FOLDER, 0o1777, 0, 0, True, None),  # /tmp
        (FOLDER, 0o1777, 0, 0, False, "is writable by everybody"),
        (FOLDER, 0o1775, 0, 50, True, None),
        (FOLDER, 0o777, 0, 0, True, "is writable by everybody"),
        (FOLDER, 0o2775, ME, 50, True, "is writable by its group"),
        (FOLDER, 0o755, EVE, 50, True, "belongs to user 1001"),
        (FOLDER, 0o1777, EVE, 50, True, "belongs to user 1001"),
        (LINK, 0o777, ME, 50, True, None),
        (LINK, 0o777, EVE, 50, True, "belongs to user 1001"),
    ],
)
def test_each_thing_on_the_way(kind: int, mode: int, uid: int, gid: int, above: bool, said: str | None):
    status = SimpleNamespace(st_mode=kind | mode, st_uid=uid, st_gid=gid)
    assert fault(status, Reader(ME, group=ME), above=above) == said


def test_a_container_that_does_not_know_root():
    reader = Reader(ME, system=frozenset({0, NOBODY}))
    status = SimpleNamespace(st_mode=FOLDER | 0o755, st_uid=NOBODY, st_gid=NOBODY)
    assert fault(status, reader, above=True) is None
    assert "belongs to" in (fault(status, reader) or "")  # it may as well be eve's


def test_a_folder_of_ones_own(tmp_path: Path):
    file = tmp_path / "a" / "b" / "file"
    assert trusted(file) == f"{file} does not exist"
    assert trusted(file, missing_ok=True) is None
    file.parent.mkdir(parents=True)
    file.touch()
    assert trusted(file) is None
    assert trusted(str(tmp_path / "a" / "b" / ".." / "b" / "file")) is None
    assert trusted(os.path.relpath(file)) is None
    assert trusted("/") is None


@pytest.mark.parametrize("mode", [0o757, 0o777])
def test_who_may_write_above_may_replace_what_is_below(tmp_path: Path, mode: int):
    file = tmp_path / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.touch()
    file.parent.parent.chmod(mode)
    assert trusted(file) == f"{tmp_path / 'a'} is writable by everybody"
    file.parent.parent.chmod(0o1777)
    assert trusted(file) is None
    assert trusted(file.parent.parent) == f"{tmp_path / 'a'} is writable by everybody"
    file.chmod(0o666)
    assert trusted(file) == f"{file} is writable by everybody"


def test_links_are_followed_and_looked_at(tmp_path: Path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "file").touch()
    (tmp_path / "own").mkdir()
    link = tmp_path / "own" / "link"
    link.symlink_to("../open/file")
    assert trusted(link) == f"{tmp_path / 'open'} is writable by everybody"
    link.unlink()
    link.symlink_to(tmp_path / "own")
    assert trusted(link) is None
    link.unlink()
    link.symlink_to("link")
    assert trusted(link) == f"{link} cannot be looked at (Too many levels of symbolic links)"
    link.unlink()
    link.symlink_to("nothing")
    assert trusted(link, missing_ok=True) is None


@as_root
def test_another_users_link_in_a_folder_for_all(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(tmp_path / "mine")
    assert trusted(shared / "link") is None
    os.chown(shared / "link", NOBODY, NOBODY, follow_symlinks=False)
    assert "link belongs to user " in (trusted(shared / "link") or "")


@as_root
def test_another_users_file_and_folder(tmp_path: Path):
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.touch()
    os.chown(file, NOBODY, -1)
    assert (trusted(file) or "").startswith(f"{file} belongs to user ")
    os.chown(file, 0, 0)
    os.chown(file.parent, NOBODY, -1)
    assert (trusted(file) or "").startswith(f"{file.parent} belongs to user ")


def test_a_group_of_one_is_the_user_alone(monkeypatch: pytest.MonkeyPatch):
    user = SimpleNamespace(pw_name="ada", pw_gid=7)
    monkeypatch.setattr(trust.pwd, "getpwuid", lambda uid: user)

    def group(name: str, members: list[str]) -> int | None:
        monkeypatch.setattr(trust.grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_gid=gid, gr_mem=members))
        return trust._group_of_one(ME)

    assert group("ada", []) == group("ada", ["ada"]) == 7
    assert group("users", []) is group("ada", ["eve"]) is None


# -- beside data -----------------------------------------------------------------------------------------------------------


def beside(tmp_path: Path, mode: int) -> tuple[Path, Path, Path]:
    """Data in a folder of this mode, and a result beside them."""
    folder = tmp_path / "data"
    (folder / "statistics").mkdir(parents=True)
    (folder / "store.h5").touch()
    (folder / "statistics" / "file.json").touch()
    folder.chmod(mode)
    return folder / "statistics" / "file.json", folder / "store.h5", folder


def test_what_is_beside_data_is_trusted_as_they_are(tmp_path: Path):
    file, data, folder = beside(tmp_path, 0o755)
    assert added(file, data, folder) is None
    assert added(file.parent / "other.json", data, folder) is None
    file.chmod(0o646)
    assert added(file, data, folder) == f"{file} is writable by more users than the data are"
    file.chmod(0o644)
    file.parent.chmod(0o1777)
    assert added(file, data, folder) == f"{file.parent} is writable by more users than the data are"
    folder.chmod(0o777)  # whoever may write there may change the data as well
    assert added(file, data, folder) is None


@as_root
def test_who_may_add_but_not_change_is_not_believed(tmp_path: Path):
    file, data, folder = beside(tmp_path, 0o1777)
    os.chown(file, NOBODY, -1)
    assert (added(file, data, folder) or "").endswith(", who cannot change the data")
    folder.chmod(0o777)
    assert added(file, data, folder) is None
    folder.chmod(0o1777)
    os.chown(data, NOBODY, -1)  # the data are theirs too
    assert added(file, data, folder) is None
