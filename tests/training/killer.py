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
from toy import ToyTask, recipe

from smoe_hpc.training import train

CHANGES = {"training__epochs": 6, "run__checkpoint_every": 3, "training__routing_refresh": 2, "training__routing_delay": 1}


class SlowTask(ToyTask):
    def loss(self, output, batch):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return super().loss(output, batch)


def child(folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(recipe(**CHANGES), SlowTask("smoe"), run_dir=folder, progress=False)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def finish(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main() -> None:
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.monotonic()
    finish(child(folder / "whole"))
    whole = time.monotonic() - began
    found = []
    for _ in range(kills):
        pid = child(folder / "killed")
        time.sleep(chance.uniform(0.1, 0.6) * whole)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.append(sorted(path.name for path in (folder / "killed" / "checkpoints").glob("*")))
    finish(child(folder / "killed"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
