"""The folder that a submitted job's files lie in: nobody else may change them, and nothing in them can run here.

submitit writes the call that a job makes as a pickle, `<id>_submitted.pkl`, and the job runs whatever stands there when it
starts; so nobody but the user may write the folder or the file. What the job leaves, `<id>_<rank>_result.pkl`, is read
here without loading anything: it holds built-in types only.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoe_hpc.errors import LaunchError, RunError
from smoe_hpc.files.regular import read_bytes

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_BYTES = 64 << 20  # of a result, which are some scores


def make_own(folder: Path) -> None:
    """Make a folder that nobody else may write; one that is there becomes so.

    Folders above it may be shared with a group, which is then trusted with the runs in them as their owner is, but not with
    everybody (``/tmp`` is root's, and lets nobody replace what is another's).

    Raises:
        LaunchError: it cannot be made, belongs to another user, or lies where anybody may put another in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        real = folder.resolve()
        status = real.stat()
        if status.st_uid != os.getuid():
            raise LaunchError(
                f"{folder} belongs to another user (id {status.st_uid}), who could change what it runs; choose another root"
            )
        for above in real.parents:
            found = above.stat()
            mode, owner = found.st_mode, found.st_uid
            if mode & stat.S_IWOTH and not (mode & stat.S_ISVTX and owner in (0, os.getuid())):
                raise LaunchError(
                    f"{above} may be changed by everybody (mode {stat.S_IMODE(mode):o}), and with it what your job runs; "
                    f"choose another root, or chmod o-w {above}"
                )
        if status.st_mode & _OTHERS_WRITE:
            real.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written ({error.strerror}); choose another root") from None


@contextlib.contextmanager
def closed(folder: Path) -> Iterator[None]:
    """While files are put there that a job runs, nobody else enters; afterwards nobody else may change them.

    submitit makes them with the user's umask, which in many groups lets the group write.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    folder.chmod(stat.S_IRWXU)
    try:
        yield
    finally:
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # of an older job that ends at this moment
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_mode & _OTHERS_WRITE:
                    path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
        folder.chmod(mode)


def read_outcome(path: Path) -> tuple[str, Any]:
    """What a task left: ("success", its scores) or ("error", the text of its error).

    Raises:
        RunError: no regular file, a large one, or anything but built-in types in it; nothing of it was run.
    """
    try:
        content = read_bytes(path, _MOST_BYTES, follow=False)
        kind, value = _BuiltinUnpickler(io.BytesIO(content)).load()  # type: ignore[attr-defined]  # mypy takes our io/ for it
        if (kind, type(value)) not in (("success", dict), ("error", str)):
            raise ValueError("neither scores nor an error")
        return kind, value
    except Exception as error:  # a pickle that somebody made up may end in any
        raise RunError(f"{path} is not the result of a job ({error}); remove it, and submit the run again") from error


class _BuiltinUnpickler(pickle.Unpickler):
    """Builds texts, numbers, lists, tuples and dicts: whatever else a pickle names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}")

    def persistent_load(self, what: Any) -> Any:
        raise ValueError("it refers to something outside")
