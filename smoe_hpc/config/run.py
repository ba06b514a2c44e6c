"""The run section of a recipe: where a run is kept and what it writes."""

from __future__ import annotations

from dataclasses import dataclass

from smoe_hpc.config import rules


@dataclass(frozen=True)
class Run:
    """Where a run is kept and what it writes.

    Attributes:
        root: folder of all runs; the run's own is ``<root>/<name>``.
        checkpoint_every: optimiser steps between two checkpoints, at least 1; null saves once an epoch.
        checkpoint_seconds: also save after this many seconds since the last, above 0; null does not. A run's first checkpoint
            is made after a minute at most, in any case.
        keep: newest checkpoints that stay on disk (the best one stays as well); at least 1.
        log_every: optimiser steps between two lines of metrics.jsonl, at least 1.
        pictures: draw pictures when training ends.
        tensorboard: write TensorBoard event files too.
    """

    root: str = "runs"
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = None
    keep: int = 2
    log_every: int = 1
    pictures: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check_run(self)


def _check_run(run: Run) -> None:
    """Intervals of checkpoints and logs."""
    rules.require(bool(run.root.strip()), "run.root", run.root, "must be a folder, e.g. run.root=runs")
    rules.check_count("run.checkpoint_every", run.checkpoint_every, 1000)
    rules.check_positive("run.checkpoint_seconds", run.checkpoint_seconds, 600)
    rules.check_count("run.keep", run.keep, 2)
    rules.check_count("run.log_every", run.log_every, 1)
