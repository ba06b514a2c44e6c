"""What the verbs print: lines, tables, scores, progress; all of it from the first rank only, and harmless for a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import typer

from smoe_hpc.errors import SmoeError
from smoe_hpc.text import printable

_PIPE_WIDTH = 160  # columns of a table in a pipe, which must not cut figures
_MANY = 100  # rows of a table, from which on it is drawn without a frame
_MOST_COLUMNS = 8  # of scores; more would be cut


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
        typer.echo(printable(text))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, numbers to the right, from the first rank only.

    Args:
        title: above it.
        columns: headings; the first column holds names.
        rows: cells, as many in each row as there are columns.
    """
    if this_rank() != 0:
        return
    width = sum(max(len(printable(row[column])) + 3 for row in (columns, *rows)) for column in range(len(columns))) + 1
    if len(rows) > _MANY or (width > _PIPE_WIDTH and not sys.stdout.isatty()):  # a frame would cut figures
        _show_unframed(title, columns, rows)
        return
    from rich.table import Table
    from rich.text import Text

    def cell(text: str) -> Text:  # no markup either: [bold] may be part of a name
        return Text(printable(text))

    table = Table(title=Text(printable(title), style="bold"), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(cell(column), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(cell, row))
    show(table)


def _show_unframed(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns without a frame: drawing one around a thousand rows takes rich longer than reading a thousand runs."""
    lines = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [printable(title)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    typer.echo("\n".join(text))


def show(renderable: Any) -> None:
    """Something that rich can draw, on stdout, from the first rank only."""
    if this_rank() != 0:
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(renderable)


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


@contextlib.contextmanager
def progress(what: str, *, each: bool = False) -> Iterator[Callable[..., None]]:
    """A function to be called with (done, total), and the name of the last thing done if it has one.

    On a terminal it moves a bar; in a pipe it prints a line at each quarter.

    Args:
        what: is being done.
        each: in a pipe a line for each thing done, with its name and the seconds so far; a bar only once something is.
    """
    what = printable(what)
    if not sys.stderr.isatty():
        yield _lines(what, each)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    more = (TimeElapsedColumn() if each else TimeRemainingColumn(), TextColumn("{task.fields[name]}", markup=False))
    with Progress(*columns, *more, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, name="", visible=not each)

        def move(done: int, total: int, name: str = "") -> None:
            bar.update(task, completed=done, total=total, name=printable(name), visible=True)

        yield move


def _lines(what: str, each: bool) -> Callable[..., None]:
    start, told = time.monotonic(), set[int]()

    def line(done: int, total: int, name: str = "") -> None:
        quarter = 4 * done // max(total, 1)
        if each and done:
            typer.echo(f"{what}: {done}/{total} {printable(name)} ({time.monotonic() - start:.0f} s)", err=True)
        elif not each and quarter not in told and quarter > 0:
            told.add(quarter)
            typer.echo(f"{what}: {done}/{total}", err=True)

    return line
