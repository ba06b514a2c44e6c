"""The folder of a run: who may write in it, which recipe it belongs to, and what came out.

::

    config.yaml      the resolved recipe
    lock             held by rank 0 while it trains; says who holds it
    metrics.jsonl    per step, epoch and validation (timing.jsonl: how fast)
    checkpoints/     step_N
    finished.json    why training ended, where, on which data, and the best step
    scores.json      {split: {region: {score: value}}}
    weights.safetensors
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from smoe_hpc.config import Recipe, load_recipe, to_yaml
from smoe_hpc.errors import ConfigError, RunError
from smoe_hpc.launch.job import job_id
from smoe_hpc.training import files
from smoe_hpc.training.position import Position
from smoe_hpc.training.task import Scores

# A change of these does not make it another experiment: it may go on longer, or be written down otherwise.
_FREE = ("run.", "loader.", "training.epochs", "training.max_steps", "training.stop_at_score", "training.threads")


class RunDirectory:
    """A run's folder and the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights.safetensors"
        self._config = path / "config.yaml"
        self._finished = path / "finished.json"
        self._scores = path / "scores.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other runs; created if missing. The system lets go of it when the process dies.

        Raises:
            RunError: another process holds it (it says which), or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+")
        except OSError as error:
            raise RunError(f"run directory {self.path} cannot be written: {error}; choose another run.root") from error
        with file:
            if not _lock(file):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunError(f"run directory {self.path} is in use by {holder}: wait for it, or choose another name")
            file.truncate(0)
            job = job_id(os.environ)
            file.write(f"process {os.getpid()} on {socket.gethostname()}{f' of Slurm job {job}' if job else ''}\n")
            file.flush()
            yield

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Find out whether the folder may become, or is, this recipe's; nothing is written.

        Raises:
            RunError: the folder belongs to a recipe with other values (it names them), or holds a run and ``resume`` is
                False.
        """
        if self._config.exists():
            if not resume and (self._scores.exists() or any(self.checkpoints.glob("step_*"))):
                raise RunError(f"run directory {self.path} holds a run: remove it, choose another name, or resume it")
            changed = differences(self.recipe(), recipe)
            if changed:
                shown = ", ".join(f"{key}={new} (there: {old})" for key, old, new in changed[:4])
                more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
                raise RunError(
                    f"run directory {self.path} belongs to another recipe: {shown}{more}; "
                    "choose another name for this one, or give the same values"
                )

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's, once `check` found that it may be."""
        self.checkpoints.mkdir(exist_ok=True)
        files.write_whole(self._config, to_yaml(recipe).encode())

    def recipe(self) -> Recipe:
        """The recipe that the folder belongs to. RunError if there is none, or none that can be read."""
        if not self._config.exists():
            raise RunError(f"{self.path} is not a run: it has no config.yaml")
        try:
            return load_recipe(self._config)
        except ConfigError as error:
            raise RunError(f"{self.path} has a recipe that this version cannot read ({error}); choose another name") from error

    def finished_scores(self, recipe: Recipe) -> dict[str, Scores] | None:
        """Scores of a run that has ended and has nothing more to do, else None."""
        if not (self._finished.exists() and self._scores.exists()):
            return None
        ended = json.loads(self._finished.read_text())
        limit = ended["limit"]
        if limit is not None and getattr(recipe.training, ended["reason"]) != limit:
            return None
        scores: dict[str, Scores] = json.loads(self._scores.read_text())
        return scores

    def reopen(self) -> None:
        """Forget that the run had ended."""
        self._finished.unlink(missing_ok=True)

    def ended_at(self) -> tuple[Position, dict[str, str]] | None:
        """Where a run that has ended stands, and the identity of its data; None of a run that has not."""
        if not self._finished.exists():
            return None
        ended = json.loads(self._finished.read_text())
        where = Position(step=ended["step"], epoch=ended.get("epoch", 0), in_epoch=ended.get("in_epoch", 0))
        return where, ended.get("identity", {})

    def finish(
        self,
        recipe: Recipe,
        reason: str,
        position: Position,
        best_step: int,
        scores: dict[str, Scores],
        identity: dict[str, str],
    ) -> None:
        """Write down how training ended.

        Args:
            recipe: of the run.
            reason: "epochs", "max_steps", "early_stop" or "stop_at_score".
            position: where.
            best_step: step of the best checkpoint.
            scores: of that checkpoint.
            identity: what checkpoints keep of recipe, grid and data.
        """
        files.write_json(self._scores, scores)
        limit = None if reason == "early_stop" else getattr(recipe.training, reason)
        where = {"step": position.step, "epoch": position.epoch, "in_epoch": position.in_epoch}
        ended = {"reason": reason, "limit": limit, **where, "best_step": best_step, "identity": identity}
        files.write_json(self._finished, ended)

    def best_step(self) -> int | None:
        """Step of the best checkpoint of a run that has ended, else None."""
        if not self._finished.exists():
            return None
        return int(json.loads(self._finished.read_text())["best_step"])


def _lock(file: IO[str]) -> bool:
    """Lock a file for this process alone; False where another holds it for longer than who merely looks."""
    for _ in range(11):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # `smoe-hpc status` finds out with a short lock whether the run goes on
            time.sleep(0.1)
    return False


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of what makes two recipes different experiments."""
    before, after = dict(_flat(asdict(old))), dict(_flat(asdict(new)))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        (key, before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and not key.startswith(_FREE)
    ]


def identity_of(recipe: Recipe) -> str:
    """Hash of what makes the recipe this experiment."""
    return files.sha256_of_json([pair for pair in _flat(asdict(recipe)) if not pair[0].startswith(_FREE)])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
