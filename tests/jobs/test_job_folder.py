"""What a submitted job leaves is read without running any of it, and nobody else may change what it runs."""

import os
import pickle
import stat
from pathlib import Path

import cloudpickle
import pytest

from smoe_hpc.errors import LaunchError, RunError
from smoe_hpc.jobs.folder import closed, make_own, read_outcome
from smoe_hpc.launch import submit


class _Command:
    """Runs a command as soon as it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_plain_outcomes_are_read(tmp_path: Path) -> None:
    for outcome in (("success", {"test": {"all": {"rmse": 1.5}}}), ("error", "DataError: no data")):
        (tmp_path / "1_0_result.pkl").write_bytes(cloudpickle.dumps(outcome))
        assert read_outcome(tmp_path / "1_0_result.pkl") == outcome


def test_a_hostile_result_runs_nothing(tmp_path: Path) -> None:
    path, touched = tmp_path / "1_0_result.pkl", tmp_path / "touched"
    command = _Command(f"touch {touched}")
    hostile = [
        ("it names posix.system", pickle.dumps(("success", {"test": command}))),
        ("it names pathlib.PosixPath", pickle.dumps(("success", {"test": Path("x")}))),
        ("neither scores nor an error", pickle.dumps(("success", 3))),
        ("not enough values", pickle.dumps(())),
        ("truncated", b"garbage"),
        ("Ran out of input", b""),
        ("refers to something outside", b"\x80\x04\x8c\x01xQ."),
    ]
    for words, content in hostile:
        path.write_bytes(content)
        with pytest.raises(RunError, match=rf"1_0_result\.pkl is not the result of a job \(.*{words}.*; remove it"):
            read_outcome(path)
    assert not touched.exists()
    path.unlink()
    os.mkfifo(path)  # would wait for a writer
    with pytest.raises(RunError, match="not a regular file"):
        read_outcome(path)
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(pickle.dumps(("success", {})))
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is not the result of a job"):
        read_outcome(path)


def test_a_result_that_was_put_in_place_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    job = submit("heat_smoe", data__store="empty", root=tmp_path / "runs", cluster="local", time=5)
    with pytest.raises(RunError, match="ended as FAILED"):
        job.result(timeout=100)
    folder = job.run_dir / "jobs"
    assert mode(folder) & 0o022 == 0
    (submitted,) = folder.glob("*_submitted.pkl")
    assert mode(submitted) & 0o022 == 0
    (result,) = folder.glob("*_result.pkl")
    touched = tmp_path / "touched"
    result.write_bytes(pickle.dumps(("success", {"test": _Command(f"touch {touched}")})))
    with pytest.raises(RunError, match=r"is not the result of a job \(it names posix\.system\)"):
        job.result(timeout=100)
    assert not touched.exists()


def test_the_folder_is_the_users_alone_to_write(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "jobs"
    folder.mkdir(parents=True)
    folder.chmod(0o2775)
    (folder / "old.pkl").touch()
    make_own(folder)
    assert mode(folder) == 0o2755
    with closed(folder):
        assert mode(folder) == 0o700
        (folder / "1_submitted.pkl").touch()
        (folder / "1_submitted.pkl").chmod(0o666)
    assert mode(folder) == 0o2755
    assert mode(folder / "1_submitted.pkl") == 0o644


def test_a_folder_that_others_can_exchange_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(LaunchError, match=r"shared may be changed by everybody \(mode 777\).*or chmod o-w"):
        make_own(shared / "run" / "jobs")
    shared.chmod(0o1777)  # as /tmp is: what others own there cannot be exchanged
    make_own(shared / "run" / "jobs")
    if os.geteuid() == 0:
        os.chown(shared, 12345, -1)  # whose owner may exchange whatever is in it
        with pytest.raises(LaunchError, match=r"shared may be changed by everybody \(mode 1777\)"):
            make_own(shared / "run" / "jobs")
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"cannot be written .*; choose another root"):
        make_own(tmp_path / "file" / "jobs")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    os.chown(folder, 12345, -1)
    with pytest.raises(LaunchError, match=r"belongs to another user \(id 12345\), who could change what it runs"):
        make_own(folder)
