"""Progress of a run for a person: a live bar on a terminal, a line every ten seconds in a pipe."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from smoe_hpc.text import printable

_REFRESH = 0.25  # seconds between updates of the bar
_LINES = 10.0  # seconds between lines in a pipe


class Watch:
    """Progress on standard error.

    Args:
        name: of the run.
        total: steps at most.
        done: steps done before this process started.
        active: False shows nothing (ranks other than 0, or progress switched off).
    """

    def __init__(self, name: str, total: int, done: int, active: bool) -> None:
        self._name, self._total, self._before = printable(name), total, done
        self._bar: Progress | None = None
        self._active = active
        self._started = self._shown = time.monotonic()
        self._note = ""
        self._period = _LINES
        if active and sys.stderr.isatty():
            self._period = _REFRESH
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._task = self._bar.add_task(self._name, total=total, completed=done, text="")
            self._bar.start()

    def due(self, now: float) -> bool:
        """Whether a call of `show` would be seen."""
        return self._active and now - self._shown >= self._period

    def show(self, step: int, samples: int, waited: float, now: float) -> None:
        """Update.

        Args:
            step: steps done.
            samples: samples that all ranks have processed since this process started.
            waited: seconds since then that this rank waited for data.
            now: ``time.monotonic()``.
        """
        self._shown = now
        elapsed = max(now - self._started, 1e-9)
        rate = (step - self._before) / elapsed
        left = _duration((self._total - step) / rate) if rate else "?"
        share = 100 * waited / elapsed
        text = f"{samples / elapsed:.0f} samples/s, data wait {share:.0f} %, at most {left} left{self._note}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            print(f"{self._name}: step {step}/{self._total}, {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Text to show beside the rates from now on, such as the last score."""
        self._note = f", {printable(text)}" if text else ""

    def say(self, text: str) -> None:
        """Print a line that stays visible."""
        if not self._active:
            return
        line = f"{self._name}: {printable(text)}"
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
