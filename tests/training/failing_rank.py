"""Trains, and one rank fails: ``failing_rank.py RUN_DIR RANK signal NAME`` sends it a signal in step 7, and
``failing_rank.py RUN_DIR RANK store WHOLE DAMAGED`` lets it alone read a damaged store.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401  # takes seconds, and the ranks are to begin together

from tests.training import toy
from tests.training.stored import StoredTask


class SignalledTask(toy.ToyTask):
    """Sends its process a signal in step 7."""

    sent = signal.SIGTERM

    def loss(self, output, batch):  # type: ignore[no-untyped-def]
        if self._calls == 6:
            os.kill(os.getpid(), self.sent)
        return super().loss(output, batch)


def meet(run_dir: Path) -> None:
    """Wait for the other ranks."""
    Path(f"{run_dir}.{os.environ['RANK']}").touch()
    while not all(Path(f"{run_dir}.{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.05)


def main() -> int:
    run_dir, fails = Path(sys.argv[1]), os.environ["RANK"] == sys.argv[2]
    if sys.argv[3] == "store":
        whole, damaged = map(Path, sys.argv[4:])
        recipe, task = toy.recipe(loader__verify="all"), StoredTask(damaged if fails else whole)
    else:
        recipe = toy.recipe(training__validate_every=None, run__checkpoint_every=1000)
        task = SignalledTask() if fails else toy.ToyTask()
        SignalledTask.sent = signal.Signals[sys.argv[4]]
    meet(run_dir)
    return toy.exit_status(recipe, task, run_dir, progress=False)


if __name__ == "__main__":
    sys.exit(main())
