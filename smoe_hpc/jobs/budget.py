"""Training one recipe within a time budget, in a process of its own, and reading what it reached.

The budget is kept from outside: when it is spent the process is signalled to stop, saves and exits, and the run is
scored as it stands. So the budget is no part of the recipe, and the same run can be resumed with a larger one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smoe_hpc.errors import RunError
from smoe_hpc.runs import Scores

STOPPED = 75  # exit status of a run that was signalled to stop and saved its state
_COMMAND = [sys.executable, "-m", "smoe_hpc"]
_GRACE = 60.0  # seconds that a run may take to save


@dataclass(frozen=True)
class Outcome:
    """What a run reached within its budget.

    Attributes:
        finished: whether it ended by its recipe; False where the budget was spent.
        seconds: wall-clock time of the process: start, training, validation.
        scores: of the test split, as the run stands.
    """

    finished: bool
    seconds: float
    scores: Scores


def train_within(recipe: str, overrides: Sequence[str], *, run_dir: Path, seconds: float, resume: bool) -> Outcome:
    """Train a recipe for at most ``seconds`` and score it on the test split.

    Args:
        recipe: name or file.
        overrides: ``key=value``.
        run_dir: where the recipe's run lies.
        seconds: the budget.
        resume: False refuses a folder that holds a run.

    Raises:
        RunError: training or scoring failed; the process has said why on stderr.
    """
    start = time.monotonic()
    status = run_verb(["train", recipe, *overrides, "--resume" if resume else "--fresh"], seconds)
    spent = time.monotonic() - start
    if status not in (0, STOPPED):
        raise RunError(f"{recipe}: training ended with status {status}; see above, or train it alone")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "scores.json"
        scored = run_verb(["evaluate", str(run_dir), "--json", str(answer)], None)
        if scored != 0:
            raise RunError(f"{recipe}: scoring ended with status {scored}; see above, or try smoe-hpc evaluate {run_dir}")
        scores: Scores = json.loads(answer.read_text(encoding="utf-8"))["test"]
    return Outcome(status == 0, spent, scores)


def run_verb(arguments: Sequence[str], seconds: float | None) -> int:
    """Run a verb of `smoe-hpc` in a process of its own; signalled to stop after ``seconds``, and killed if it does not.

    Progress and errors (stderr) are shown, its tables (stdout) are not.

    Returns:
        Its exit status.
    """
    with subprocess.Popen([*_COMMAND, *arguments], stdout=subprocess.DEVNULL) as process:
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
