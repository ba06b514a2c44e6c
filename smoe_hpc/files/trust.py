"""Whose is it? What runs in this process must be nobody else's to change: this user's or root's, and writable by no other.

Where that holds for a file and for every folder above it, nobody else can act between the check and the use, so a path may
be checked first and opened by its name afterwards. A folder with the sticky bit (``/tmp``) may stand above: others can add
to it, but can neither rename nor remove what is not theirs.
"""

from __future__ import annotations

import errno
import functools
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MOST_LINKS = 40  # as the kernel follows


@dataclass(frozen=True)
class Reader:
    """Who asks.

    Args:
        uid: the user.
        group: the user's group of one, in which nobody else is (the umask 002 of many systems goes with it); None without.
        system: who may own the folders above. Root alone, but for a container that does not know root: there also the
            user as whom it shows everybody whom it does not know.
    """

    uid: int
    group: int | None = None
    system: frozenset[int] = frozenset({0})


def trusted(path: str | os.PathLike[str], *, missing_ok: bool = False) -> str | None:
    """Why a file or folder cannot be trusted, in words that name the path; None where it can be.

    It and every folder and link on the way belong to this user or to root, and nobody else may write to it or replace it.

    Args:
        path: of anything; links are followed, and must be trusted themselves.
        missing_ok: whether something that does not exist yet is as good as the folder in which it would be made.
    """
    reader = this_reader()
    try:
        for here, status, last in _on_the_way(Path(path)):
            reason = fault(status, reader, above=not last)
            if reason is None and status.st_mode & stat.S_IWGRP and _has_acl(here):
                reason = "is writable by others (an access list)"
            if reason is not None:
                return f"{here} {reason}"
    except (FileNotFoundError, NotADirectoryError):
        return None if missing_ok else f"{path} does not exist"
    except OSError as error:
        return f"{error.filename or path} cannot be looked at ({error.strerror})"
    return None


def fault(status: os.stat_result, reader: Reader, *, above: bool = False) -> str | None:
    """What is wrong with a file, folder or link by itself, as in "belongs to eve"; None for nothing.

    Args:
        status: of the thing itself, links not followed.
        reader: who asks.
        above: whether it only stands above what is asked for, where the sticky bit is enough.
    """
    owners = {0, reader.uid, *(reader.system if above else ())}
    if status.st_uid not in owners:
        return f"belongs to {_user_name(status.st_uid)}"
    if stat.S_ISLNK(status.st_mode) or (above and stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return None
    if status.st_mode & stat.S_IWOTH:
        return "is writable by everybody"
    if status.st_mode & stat.S_IWGRP and status.st_gid != reader.group:
        return "is writable by its group"
    return None


def added(path: Path, data: Path, folder: Path) -> str | None:
    """Why a file beside data may be the work of somebody who could not change the data; None if not.

    Whoever can change the data is trusted as they are. What does not exist is nobody's work.

    Args:
        path: the file, or where it would be.
        data: to which it belongs.
        folder: of the data, above the file.
    """
    reader = this_reader()
    writable = stat.S_IWGRP | stat.S_IWOTH
    try:
        above = os.stat(folder)
        owners = {0, reader.uid, above.st_uid, *([os.stat(data).st_uid] if data.exists() else ())}
        given = 0 if above.st_mode & stat.S_ISVTX else above.st_mode & writable  # to replace the data, not only to add
        for here in [*reversed([one for one in path.parents if folder in one.parents]), path]:
            for status in (os.lstat(here), os.stat(here)):
                if not given and status.st_uid not in owners:
                    return f"{here} belongs to {_user_name(status.st_uid)}, who cannot change the data"
                more = 0 if stat.S_ISLNK(status.st_mode) else status.st_mode & writable & ~given
                if more & stat.S_IWOTH or (more and status.st_gid != reader.group):
                    return f"{here} is writable by more users than the data are"
    except (FileNotFoundError, PermissionError):  # what cannot be reached cannot be read either
        return None
    except OSError as error:
        return f"{path} cannot be looked at ({error.strerror})"
    return None


def this_reader() -> Reader:
    """The user of this process."""
    return _reader(os.geteuid())


@functools.cache
def _reader(uid: int) -> Reader:
    return Reader(uid, _group_of_one(uid), frozenset({0, *_unknown_users()}))


def _group_of_one(uid: int) -> int | None:
    """The user's own group where the system makes one for each user: of the same name, without other members."""
    try:
        user = pwd.getpwuid(uid)
        group = grp.getgrgid(user.pw_gid)
    except KeyError:
        return None
    return group.gr_gid if group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name} else None


def _unknown_users() -> Iterator[int]:
    """In a container that maps this user alone, root of the host looks like nobody: the number of that nobody."""
    try:
        mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if mapped and not any(int(inside) == 0 for inside, *_ in mapped):
            yield int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return


def _on_the_way(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Every folder and link that is passed on the way to a path, and what is there; whether it is the last."""
    ahead = [*reversed((Path.cwd() / path).parts)]
    here, links = Path(ahead.pop()), 0
    yield here, os.lstat(here), not ahead
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = here.parent  # links have been followed: this is what the system does
            if not ahead:
                yield here, os.lstat(here), True
            continue
        there = here / part
        status = os.lstat(there)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            yield there, status, False
            target = Path(os.readlink(there))
            ahead += [part for part in reversed(target.parts) if part != target.anchor]
            here = Path(target.anchor) if target.is_absolute() else here
            if not ahead:
                yield here, os.lstat(here), True
            continue
        here = there
        yield here, status, not ahead


def _has_acl(path: Path) -> bool:
    """Whether more than owner and group are named: the group's bits are then the mask of what those may do."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (OSError, AttributeError):
        return False


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
