"""How a verb ends: errors, warnings and logged messages in one line each, and the exit status.

Exit status: 0 done, 2 an error that the user can act on, 75 a run that was asked to stop and can be resumed, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from smoe_hpc.cli.output import this_rank
from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.text import printable

_EXTRAS = {
    "plotly": "report",
    "jinja2": "report",
    "xarray": "convert",
    "cfgrib": "convert",
    "eccodes": "convert",
    "hdf5plugin": "convert",
    "nvidia": "dali",
}


class Commands(TyperGroup):
    """The verbs, with our errors told in one line in place of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; a SmoeError becomes one line on stderr and an exit status."""
        try:
            with _warnings_in_one_line(), _log_in_one_line():
                return super().invoke(ctx)
        except SmoeError as error:
            _tell(error)
            raise typer.Exit(getattr(error, "exit_status", 2)) from None
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in _EXTRAS:
                raise
            typer.echo(f"error: {module} is not installed; run: pip install 'smoe-hpc[{_EXTRAS[module]}]'", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def _tell(error: SmoeError) -> None:
    """One line. Other ranks than the first speak only of what may be theirs alone, such as a file they do not see."""
    rank = this_rank()
    stopped = getattr(error, "exit_status", 2) != 2  # as asked, which is no error
    if rank == 0:
        typer.echo(printable(error if stopped else f"error: {error}"), err=True)
    elif not stopped and not isinstance(error, ConfigError):
        typer.echo(printable(f"error (rank {rank}): {error}"), err=True)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """UserWarnings as ``warning: ...``, once and on the first rank only; others as Python shows them."""
    with warnings.catch_warnings():
        usual, told = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is not UserWarning:
                usual(message, category, *where, **more)
            elif this_rank() == 0 and str(message) not in told:
                told.add(str(message))
                typer.echo(printable(f"warning: {message}"), err=True)

        warnings.showwarning = show
        yield


class _OneLine(logging.Formatter):
    """A record as it would be shown, in one line of what can be printed."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def _log_in_one_line() -> Iterator[None]:
    """What is logged without any set-up of logging may hold names from outside, too."""
    last = logging.lastResort
    if last is None:
        yield
        return
    before = last.formatter
    last.setFormatter(_OneLine())
    try:
        yield
    finally:
        last.formatter = before
