"""What the verbs share: which rank speaks, tables, JSON files, and how errors end the command.

Exit status: 0 done, 2 an error that the user can act on, 75 a run that was asked to stop and can be resumed, 130
Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smoe_hpc.errors import ConfigError, DataError, SmoeError

_PLAIN_WIDTH = 160  # columns of a table where nobody's terminal sets them: a pipe must not cut figures
_MOST_COLUMNS = 8  # of scores; more would be cut
_EXTRAS = {
    "plotly": "report",
    "jinja2": "report",
    "xarray": "convert",
    "cfgrib": "convert",
    "eccodes": "convert",
    "hdf5plugin": "convert",
    "nvidia": "dali",
}


def _check_json(path: Path | None) -> Path | None:
    """Find out before a verb works for hours whether its figures can be written.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is not None and this_rank() == 0:
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
    typer.Option("--json", metavar="FILE", callback=_check_json, help="Write the figures to this file too."),
]


class Commands(TyperGroup):
    """The verbs, with our errors told in one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; a SmoeError becomes one line on stderr and an exit status."""
        try:
            with _warnings_in_one_line():
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
        typer.echo(str(error) if stopped else f"error: {error}", err=True)
    elif not stopped and not isinstance(error, ConfigError):
        typer.echo(f"error (rank {rank}): {error}", err=True)


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
                typer.echo(f"warning: {message}", err=True)

        warnings.showwarning = show
        yield


def this_rank() -> int:
    """Number of this process in its job; 0 where the launcher's variables contradict each other (the start says so)."""
    from smoe_hpc.launch.ranks import find_ranks

    try:
        return find_ranks(os.environ).rank
    except SmoeError:
        return 0


def say(text: str) -> None:
    """A line on stdout, from the first rank only."""
    if this_rank() == 0:
        typer.echo(text)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, numbers to the right, from the first rank only.

    Args:
        title: above it.
        columns: headings; the first column holds names.
        rows: cells, as many in each row as there are columns.
    """
    if this_rank() != 0:
        return
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    show(table)


def show(renderable: Any) -> None:
    """Something that rich can draw, on stdout, from the first rank only."""
    if this_rank() != 0:
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(renderable)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (done, total): a live bar on a terminal, a line at each quarter in a pipe."""
    if not sys.stderr.isatty():
        told = set[int]()

        def line(done: int, total: int) -> None:
            quarter = 4 * done // max(total, 1)
            if quarter not in told and quarter > 0:
                told.add(quarter)
                typer.echo(f"{what}: {done}/{total}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Scores {split: {region: {score: value}}} as one table per split, turned on its side where scores are many."""
    for split, regions in scores.items():
        names = list(dict.fromkeys(name for values in regions.values() for name in values))
        if len(names) > _MOST_COLUMNS:
            turned = [[name, *(figure(values.get(name)) for values in regions.values())] for name in names]
            show_table(split, ["score", *regions], turned)
            continue
        rows = [[region, *(figure(values.get(name)) for name in names)] for region, values in regions.items()]
        show_table(split, ["region", *names], rows)


def figure(value: float | None) -> str:
    """Six significant digits, as many as float32 holds; a dash for nothing.

    >>> figure(99.99964), figure(None)
    ('99.9996', '-')
    """
    return "-" if value is None else f"{value:.6g}"


def write_json(path: Path | None, content: Any) -> None:
    """Write figures to a file that a script reads; from the first rank only, nothing without a path.

    An old file stays whole until the new one is.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None or this_rank() != 0:
        return
    text = json.dumps(content, indent=2, default=str) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.resolve() if path.is_file() else path  # a link stays one, to the new content
        _writer_for(target)(target, text)
    except OSError as error:
        raise _not_writable(path, error) from None
    except DataError as error:
        raise ConfigError(f"--json: {error}") from None


def _writer_for(path: Path) -> Callable[[Path, str], object]:
    """What writes a file whole or not at all; plainly where no new file can take the old one's place: that of a pipe or a
    device, or in a folder that takes none.
    """
    if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
        return Path.write_text
    try:
        from smoe_hpc.io.atomic import write_text
    except ImportError:  # the doctor writes what it found of a broken HDF5 too
        return Path.write_text
    return write_text
