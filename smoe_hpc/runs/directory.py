"""The folder of a run: who may write in it, which recipe it belongs to, and what came out (`layout` has its files)."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoe_hpc.config import Recipe, load_recipe, to_yaml
from smoe_hpc.errors import CheckpointError, ConfigError, RunError
from smoe_hpc.files import writing
from smoe_hpc.runs import ending, layout, reading
from smoe_hpc.runs.ending import Ending
from smoe_hpc.runs.identity import differences
from smoe_hpc.runs.lock import hold
from smoe_hpc.runs.position import Position
from smoe_hpc.runs.scores import Scores


class RunDirectory:
    """A run's folder and the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / layout.CONFIG
        self.metrics = path / layout.METRICS
        self.timing = path / layout.TIMING
        self.tensorboard = path / layout.TENSORBOARD
        self.checkpoints = path / layout.CHECKPOINTS
        self.finished = path / layout.FINISHED
        self.scores = path / layout.SCORES
        self.weights = path / layout.WEIGHTS
        self.pictures = path / layout.PICTURES
        self.jobs = path / layout.JOBS

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """Where a recipe's run lies."""
        return cls(Path(recipe.run.root) / recipe.name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other runs; created if missing. See `smoe_hpc.runs.lock.hold`, also for what it raises."""
        with hold(self.path / layout.LOCK):
            yield

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Check that the folder is, or may become, this recipe's; nothing is written.

        Raises:
            RunError: the folder belongs to a recipe with other values (it names them), or holds a run and ``resume`` is
                False.
        """
        if not self.config.exists():
            if self._metrics_size() or _holds(self.checkpoints):
                raise RunError(
                    f"run directory {self.path} holds a run whose {layout.CONFIG} is gone: put it back, or choose another name"
                )
        else:
            if not resume and (self.scores.exists() or self._metrics_size() or _holds(self.checkpoints)):
                raise RunError(f"run directory {self.path} holds a run: remove it, choose another name, or resume it")
            changed = differences(self.recipe(), recipe)
            if changed:
                shown = ", ".join(f"{key}={new} (there: {old})" for key, old, new in changed[:4])
                more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
                raise RunError(
                    f"run directory {self.path} belongs to another recipe: {shown}{more}; "
                    "choose another name for this one, or give the same values"
                )
            self._refuse_removed_checkpoints()

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's, after `check`."""
        self.checkpoints.mkdir(exist_ok=True)
        for left in self.path.glob(layout.PARTIAL):  # of processes that were killed
            with contextlib.suppress(OSError):
                left.unlink()
        writing.write_whole(self.config, to_yaml(recipe).encode())

    def recipe(self) -> Recipe:
        """The recipe that the folder belongs to. RunError if there is none, or none that can be read."""
        if not self.config.exists():
            raise RunError(f"{self.path} is not a run: it has no {layout.CONFIG}")
        try:
            return load_recipe(self.config)
        except ConfigError as error:
            raise RunError(f"{self.path} has a recipe that this version cannot read ({error}); choose another name") from error

    def ending(self) -> Ending | None:
        """How the run ended, or None (see `ending.read`)."""
        return ending.read(self.path)

    def finished_scores(self, recipe: Recipe, ended: Ending) -> dict[str, Scores] | None:
        """Scores of a run that has ended and has nothing more to do; None if it has, or if they are damaged."""
        if ended.limit is not None and getattr(recipe.training, ended.reason, None) != ended.limit:
            return None
        return ending.read_scores(self.path, ended)

    def reopen(self) -> None:
        """Remove the note that the run has ended."""
        self.finished.unlink(missing_ok=True)

    def finish(
        self,
        recipe: Recipe,
        reason: str,
        position: Position,
        best_step: int,
        scores: dict[str, Scores],
        identity: dict[str, str],
    ) -> None:
        """Record how training ended, once the weights are written.

        Args:
            recipe: of the run.
            reason: "epochs", "max_steps", "early_stop" or "stop_at_score".
            position: where.
            best_step: step of the best checkpoint.
            scores: of that checkpoint.
            identity: what checkpoints keep of recipe, grid and data.
        """
        writing.write_json(self.scores, scores)
        limit = None if reason == "early_stop" else getattr(recipe.training, reason)
        digests = {path.name: writing.digest_of(path)[1] for path in (self.scores, self.weights)}
        ending.write(self.path, Ending(reason, limit, position, best_step, identity, digests))

    def check_weights(self) -> None:
        """CheckpointError if the weights of a run that has ended are not what was written."""
        ended = self.ending()
        wrong = None if ended is None else ending.what_is_wrong(self.path, ended, self.weights.name)
        if wrong is not None:
            raise CheckpointError(f"{self.weights} {wrong}; `smoe-hpc train` with the run's recipe makes it anew")

    def refuse_lost_lines(self, sizes: dict[str, int]) -> None:
        """CheckpointError if metrics.jsonl is shorter than a checkpoint counted (``sizes``)."""
        there, counted = self._metrics_size(), sizes.get("metrics", 0)
        if there < counted:
            raise CheckpointError(f"{self.metrics} has lost lines ({there} bytes of {counted})")

    def has_lines(self) -> bool:
        """Whether the run has written metrics."""
        return self._metrics_size() > 0

    def timing_events(self) -> Iterator[dict[str, Any]]:
        """What timing.jsonl still has; nothing of one that is not there or cannot be read, for timing never blocks."""
        with contextlib.suppress(OSError, reading.Unreadable):
            yield from reading.all_events(str(self.timing))

    def _metrics_size(self) -> int:
        try:
            about = self.metrics.stat()
        except FileNotFoundError:
            return 0
        if not stat.S_ISREG(about.st_mode):
            raise RunError(f"{self.metrics} is no regular file; remove it, or choose another name")
        return about.st_size

    def _refuse_removed_checkpoints(self) -> None:
        """RunError if the run has written metrics and its checkpoints are gone: to restart in silence would cut them."""
        if not self.checkpoints.exists() and self._metrics_size() and not self.finished.exists():
            raise RunError(
                f"run directory {self.path} has metrics of a run but no checkpoints/: put that folder back; to begin anew, "
                f"remove {self.metrics}, or choose another name"
            )


def _holds(folder: Path) -> bool:
    """Whether a folder of checkpoints has any; what cannot be read may have."""
    try:
        return any(name.startswith(layout.STEP) for name in os.listdir(folder))
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
