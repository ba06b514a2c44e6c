"""Figures for a script: ``--json FILE`` of every verb that prints some, and ``--json -`` for standard output."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from smoe_hpc.cli.output import this_rank
from smoe_hpc.cli.paths import user_path
from smoe_hpc.errors import ConfigError, DataError
from smoe_hpc.files.writing import write_result

STDOUT = Path("-")
_for_stdout: ContextVar[list[str] | None] = ContextVar("_for_stdout", default=None)  # what a verb has given so far


def _prepare(ctx: typer.Context, path: Path | None) -> Path | None:
    """Find out before a verb works for hours whether its figures can be written, or keep standard output for them.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None or ctx.resilient_parsing:
        return path
    if path == STDOUT:
        ctx.with_resource(_alone_on_stdout())
    elif this_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists()
            path.open("ab").close()
            if not there:
                path.unlink()
        except OSError as error:
            raise _not_writable(path, error) from None
    return path


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--json {path}: cannot be written ({error.strerror}); give another file")


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        parser=user_path,
        metavar="FILE",
        callback=_prepare,
        help="Write the figures to this file too; - is standard output, where nothing else is then printed.",
    ),
]


def write_json(path: Path | None, content: Any) -> None:
    """Write figures to a file that a script reads; from the first rank only, nothing without a path.

    An old file stays whole until the new one is. Standard output gets what a verb gave last, when it ends.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None or this_rank() != 0:
        return
    text = json.dumps(content, indent=2, default=str) + "\n"
    if path == STDOUT:
        given = _for_stdout.get()
        assert given is not None, "the option has prepared it"
        given.append(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.resolve() if path.is_file() else path  # a link stays one, to the new content
        _writer_for(target)(target, text)
    except OSError as error:
        raise _not_writable(path, error) from None
    except DataError as error:
        raise ConfigError(f"--json: {error}") from None


def _writer_for(path: Path) -> Callable[[Path, str], object]:
    """What writes a file whole or not at all; directly where no new file can take the old one's place: that of a pipe or a
    device, or in a folder that takes none.
    """
    if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
        return Path.write_text
    return write_result


@contextlib.contextmanager
def _alone_on_stdout() -> Iterator[None]:
    """Everything printed within goes to standard error, also by libraries in C and by processes started within.

    What `write_json` gave last is written to standard output at the end, whatever ended it.
    """
    given: list[str] = []
    stdout = sys.stdout
    before = _for_stdout.set(given)
    try:
        with contextlib.redirect_stdout(sys.stderr), _descriptor_on_stderr(stdout):
            yield
    finally:
        _for_stdout.reset(before)
        if given:
            stdout.write(given[-1])
            stdout.flush()


@contextlib.contextmanager
def _descriptor_on_stderr(stdout: Any) -> Iterator[None]:
    """The process's own standard output leads to its standard error; nothing where ``stdout`` is another (in tests)."""
    try:
        own = stdout.fileno() == 1
    except (AttributeError, OSError):
        own = False
    if not own:
        yield
        return
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # what C printed and has not written yet
        os.dup2(kept, 1)
        os.close(kept)
