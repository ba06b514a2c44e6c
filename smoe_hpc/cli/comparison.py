"""Training one recipe within a time budget, in a process of its own, and reading what it reached.

The budget is kept from outside: when it is spent the process is asked to stop, saves and leaves, and the run is scored
as it stands. So a recipe does not hold the budget, and the same run can be taken up again with a larger one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smoe_hpc.cli.output import figure
from smoe_hpc.config import load_recipe
from smoe_hpc.errors import RunError

STOPPED = 75  # exit status of a run that was asked to stop and saved its state
_COMMAND = [sys.executable, "-m", "smoe_hpc"]
_GRACE = 60.0  # seconds that a run may take to save
_SCORES = ("within_1pct", "rmse")  # the score to compare: the first that the task has


@dataclass(frozen=True)
class Row:
    """What one recipe reached.

    Args:
        recipe: name or file.
        seconds: wall-clock time of the whole process: start, training, validation.
        ended: "finished" or "budget spent".
        score: name of the score.
        scores: by region, "all" among them.
    """

    recipe: str
    seconds: float
    ended: str
    score: str
    scores: dict[str, float] = field(default_factory=dict)

    def cells(self, regions: Sequence[str]) -> list[str]:
        """One row of the table."""
        figures = [figure(self.scores.get(region)) for region in regions]
        return [self.recipe, f"{self.seconds:.0f}", self.ended, *figures]


def train_within(recipe: str, overrides: Sequence[str], *, seconds: float, resume: bool) -> Row:
    """Train a recipe for at most ``seconds`` and score it on the test split.

    Raises:
        RunError: training or scoring failed; the process has said why on stderr.
    """
    loaded = load_recipe(recipe, overrides)
    run_dir = Path(loaded.run.root) / loaded.name
    start = time.monotonic()
    status = _run(["train", recipe, *overrides, "--resume" if resume else "--fresh"], seconds, quiet=True)
    spent = time.monotonic() - start
    if status not in (0, STOPPED):
        raise RunError(f"{recipe}: training ended with status {status}; see above, or train it alone")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "scores.json"
        scored = _run(["evaluate", str(run_dir), "--json", str(answer)], None, quiet=True)
        if scored != 0:
            raise RunError(f"{recipe}: scoring ended with status {scored}; see above, or try smoe-hpc evaluate {run_dir}")
        regions = json.loads(answer.read_text(encoding="utf-8"))["test"]
    score = compared_score(regions)
    scores = {region: values[score] for region, values in regions.items() if score in values}
    return Row(recipe, spent, "finished" if status == 0 else "budget spent", score, scores)


def compared_score(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The score that a table shows, from {region: {score: value}}."""
    return next((name for name in _SCORES if name in scores["all"]), next(iter(scores["all"])))


def _run(arguments: Sequence[str], seconds: float | None, quiet: bool = False) -> int:
    """Run a verb as a process of its own; asked to stop after ``seconds``, killed if it does not. Its exit status.

    Progress and errors (stderr) are shown in any case; ``quiet`` leaves out its tables (stdout).
    """
    with subprocess.Popen([*_COMMAND, *arguments], stdout=subprocess.DEVNULL if quiet else None) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
        except KeyboardInterrupt:
            process.wait(_GRACE)
            raise
        try:
            return process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
