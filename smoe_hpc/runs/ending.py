"""How a run ended: `layout.FINISHED`, and whether what the run left beside it is still what was written."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoe_hpc.errors import RunError
from smoe_hpc.files import writing
from smoe_hpc.runs.layout import FINISHED, SCORES, WEIGHTS
from smoe_hpc.runs.position import Position
from smoe_hpc.runs.scores import Scores

_log = logging.getLogger(__name__)
_LARGEST = 16 << 20


@dataclass(frozen=True)
class Ending:
    """How training ended.

    Attributes:
        reason: "epochs", "max_steps", "early_stop" or "stop_at_score".
        limit: the recipe's value of that name at which it ended; None for "early_stop".
        position: where.
        best_step: step of the best checkpoint.
        identity: what checkpoints keep of recipe, grid and data; empty for runs of early versions.
        digests: {file: sha256} of what the run left; empty for runs of early versions.
    """

    reason: str
    limit: float | None
    position: Position
    best_step: int
    identity: dict[str, str]
    digests: dict[str, str]

    def how_to_go_on(self) -> str:
        """Where and why it ended, that it is not trained again, and how to train it further."""
        if self.limit is None:
            why, more = self.reason, "a larger schedule.early_stop and another --run-name"
        else:
            change = "a better" if self.reason == "stop_at_score" else "a larger"
            why, more = f"training.{self.reason}={self.limit}", f"{change} training.{self.reason}"
        where = f"ended at step {self.position.step} ({why}), so nothing was trained; its scores are of step {self.best_step}"
        return f"{where}. To train on give {more}, to train anew another --run-name"


def write(run: Path, ending: Ending) -> None:
    """Record how a run ended; OSError if that fails."""
    position = ending.position
    body = {
        "reason": ending.reason,
        "limit": ending.limit,
        "step": position.step,
        "epoch": position.epoch,
        "in_epoch": position.in_epoch,
        "best_step": ending.best_step,
        "identity": ending.identity,
        "files": ending.digests,
    }
    writing.write_json(run / FINISHED, {**body, "sha256": writing.sha256_of_json(body)})


def read(run: Path) -> Ending | None:
    """How a run ended; None of one that has not, or whose note is damaged (with a warning).

    Raises:
        RunError: the note is there and cannot be read.
    """
    try:
        body = writing.read_json(run / FINISHED, _LARGEST)
        if "sha256" in body and body.pop("sha256") != writing.sha256_of_json(body):
            raise ValueError("its checksum differs")
        where = Position(step=body["step"], epoch=body.get("epoch", 0), in_epoch=body.get("in_epoch", 0))
        ending = Ending(
            str(body["reason"]),
            body["limit"],
            where.checked(),
            int(body["best_step"]),
            dict(body.get("identity", {})),
            dict(body.get("files", {})),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.strerror is None:  # no regular file
            raise RunError(f"{error}; remove it, or put the file back") from None
        raise RunError(f"{run / FINISHED} cannot be read ({error.strerror}): give its rights back, or restore it") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s is damaged (%s); the run counts as one that has not ended", run / FINISHED, error)
        return None
    return ending


def what_is_wrong(run: Path, ending: Ending, name: str) -> str | None:
    """Why a file that an ended run left can no longer be trusted, or None; runs of early versions have no checksums."""
    try:
        digest = writing.digest_of(run / name)[1]
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "is not what was written" if ending.digests.get(name, digest) != digest else None


def read_scores(run: Path, ending: Ending) -> dict[str, Scores] | None:
    """Scores of a run that has ended; None, with a warning, where they or its weights are not what was written."""
    for name in (SCORES, WEIGHTS):
        wrong = what_is_wrong(run, ending, name)
        if wrong is not None:
            _log.warning("%s %s; the best checkpoint is scored again", run / name, wrong)
            return None
    try:
        scores: Any = writing.read_json(run / SCORES, _LARGEST)
        if not _are_scores(scores):
            raise ValueError("it holds no scores")
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s is damaged (%s); the best checkpoint is scored again", run / SCORES, error)
        return None
    return scores


def _are_scores(value: Any) -> bool:
    """Whether it is {split: {region: {score: number}}}."""
    if not isinstance(value, dict) or not all(isinstance(regions, dict) and regions for regions in value.values()):
        return False
    scores = [scores for regions in value.values() for scores in regions.values()]
    return all(
        isinstance(of_region, dict) and all(isinstance(one, (int, float)) or one is None for one in of_region.values())
        for of_region in scores
    )
