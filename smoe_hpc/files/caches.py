"""Where results are kept for later processes, and where instead if what lies there may be another user's work.

In this order: the folder that ``SMOE_CACHE`` names, or else ``~/.cache/smoe-hpc``; a private folder in the user's own cache;
a private folder among temporary files, whose name can be guessed and whose owner is therefore looked at like all others'.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from smoe_hpc.errors import ConfigError
from smoe_hpc.files.paths import expanded
from smoe_hpc.files.trust import trusted

VARIABLE = "SMOE_CACHE"
_told: set[str] = set()


@dataclass(frozen=True)
class Place:
    """A folder in which nobody else can have put anything.

    Args:
        folder: it may not exist yet.
        instead: why another one was not taken; None where it is the one that was asked for.
    """

    folder: Path
    instead: str | None = None

    def warn(self) -> Path:
        """The folder; one warning in a process about each folder that was not taken."""
        if self.instead is not None and self.instead not in _told:
            _told.add(self.instead)
            warnings.warn(
                f"{self.instead}: what lies there is not used, {self.folder} serves instead (mend its rights, "
                f"as by chmod go-w, or set {VARIABLE} to a folder of your own)",
                stacklevel=3,
            )
        return self.folder

    def make(self) -> Path:
        """Make the folder; the same.

        Raises:
            ConfigError: somebody else has made it meanwhile.
            OSError: it cannot be made.
        """
        _make(self.folder, 0o755 if self.instead is None else 0o700)
        reason = trusted(self.folder)
        if reason is not None:
            raise ConfigError(f"{reason}; set {VARIABLE} to a folder of your own")
        return self.folder


def cache_root() -> Path:
    """The folder that was asked for: ``$SMOE_CACHE``, else the user's own.

    Raises:
        ConfigError: no variable names a place, and the user has no home.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(expanded(chosen))
    try:
        return _own()
    except RuntimeError:
        message = f"no home folder to keep a cache in (HOME is not set); set {VARIABLE} to a folder"
        raise ConfigError(message) from None


def place_for(kind: str, pattern: str = "*") -> Place:
    """The first folder for one kind of result that can be trusted, with all the files in it that matter. Makes nothing.

    Args:
        kind: the folder's path below the cache's root, e.g. "statistics".
        pattern: of the names of the files that matter.

    Raises:
        ConfigError: there is none, or no root.
    """
    refused = None
    for root in _roots():
        folder = root / kind
        reason = trusted(folder, missing_ok=True)
        if reason is None:
            reason = next(filter(None, map(trusted, sorted(folder.glob(pattern)))), None)
        if reason is None:
            return Place(folder, refused)
        refused = refused or reason
    raise ConfigError(f"{refused}, and there is no private folder either; set {VARIABLE} to a folder of your own")


def own_folder(kind: str) -> Path:
    """A folder for one kind of result, made, after a warning where it is another than the one that was asked for.

    Raises:
        ConfigError: there is none, or it cannot be made.
    """
    place = place_for(kind)
    place.warn()
    try:
        return place.make()
    except OSError as error:
        message = f"{place.folder} cannot be made ({error.strerror}); free space, or set {VARIABLE} to another folder"
        raise ConfigError(message) from None


def _make(folder: Path, mode: int) -> None:
    """Whatever the umask, no folder is made that others may write to: it would not be trusted afterwards."""
    if not folder.is_dir():
        _make(folder.parent, mode)
        folder.mkdir(mode, exist_ok=True)


def _own() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoe-hpc"


def _roots() -> list[Path]:
    roots = [cache_root()]
    with contextlib.suppress(RuntimeError):  # no home
        roots.append(_own() / "private")
    return [*roots, Path(tempfile.gettempdir()) / f"smoe-hpc-{os.geteuid()}"]
