"""Files made beside data that several users share: readable for all who may read the folder of the data.

With a umask of 077 only their owner could read them, and they would block everybody else. Rights to write follow the folder
as well, except where everybody may add to it (the sticky bit): there each file stays its owner's.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_READ, _WRITE, _ENTER = 0o444, 0o222, 0o111


def make_folder(path: Path) -> None:
    """Make a folder that does not exist yet in one that does. OSError if it cannot be made."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o777 & ~_withheld(path.parent))
        above = _mode(path.parent)
        _change(path, above & (_READ | _ENTER | (0 if above & stat.S_ISVTX else _WRITE)), 0)


def open_up(path: Path) -> None:
    """Let all who may read a folder read a file in it, and only those who may write there write to it."""
    with contextlib.suppress(OSError):  # another user has just put another file there
        _change(path, _mode(path.parent) & _READ, _withheld(path.parent))


def _change(path: Path, given: int, taken: int) -> None:
    """Rights given beside those that the umask left, and taken away."""
    mode = _mode(path)
    wanted = (mode | given) & ~taken
    if wanted != mode:
        os.chmod(path, wanted)


def _withheld(folder: Path) -> int:
    """The rights to write that a folder gives to its owner alone."""
    mode = _mode(folder)
    return 0o022 if mode & stat.S_ISVTX else 0o022 & ~mode


def _mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)
