"""Trains the toy task, killed at random moments and resumed each time: ``killer.py FOLDER KILLS SEED``.

Children are forked from a process that has imported everything, so that a start takes a moment. Prints, as JSON, the
number of checkpoints that each child found.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401  # imported once, here

from smoe_hpc.training import train
from tests.training.toy import ToyTask, recipe

CHANGES = {"training__epochs": 6, "run__checkpoint_every": 3, "training__routing_refresh": 2, "training__routing_delay": 1}


class SlowTask(ToyTask):
    """Writes a byte at each step, so that whoever kills it knows how far it is, however busy the machine is."""

    def __init__(self, steps: int) -> None:
        super().__init__("smoe")
        self._steps = steps

    def loss(self, output, batch):  # type: ignore[no-untyped-def]
        os.write(self._steps, b".")
        time.sleep(0.01)
        return super().loss(output, batch)


def child(folder: Path) -> tuple[int, int]:
    """Process that trains, and where its steps can be read."""
    steps, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        os.close(steps)
        try:
            train(recipe(**CHANGES), SlowTask(written), run_dir=folder, progress=False)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(written)
    return pid, steps


def finish(folder: Path) -> None:
    """Train to the end."""
    pid, steps = child(folder)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(steps)


def kill(folder: Path, after: int, pause: float) -> None:
    """Train, and kill that some seconds after so many steps."""
    pid, steps = child(folder)
    while after and os.read(steps, 1):
        after -= 1
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(steps)


def main() -> None:
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    finish(folder / "whole")
    found = []
    for _ in range(kills):
        kill(folder / "killed", chance.randint(0, 12), chance.uniform(0.0, 0.05))
        found.append(sorted(path.name for path in (folder / "killed" / "checkpoints").glob("*")))
    finish(folder / "killed")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
