"""Two ranks that share the writing of a checkpoint, then one of them that cannot write: ``two_writers.py FOLDER``."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from smoe_hpc.errors import CheckpointError
from smoe_hpc.training.checkpoint import Checkpoints, load, shards
from smoe_hpc.training.processes import join


def main() -> None:
    processes = join()
    shards.assign = functools.partial(shards.assign, worth=1)  # so little is otherwise written by one rank
    tensors = {name: torch.arange(8.0) * number for number, name in enumerate("abcd")}
    store = Checkpoints(Path(sys.argv[1]), processes, keep=2)
    store.save(1, tensors, {"x": 1}, {"grid": "g"}, None)
    saved = store.newest()
    assert saved is not None
    assert len(set(saved.shards.values())) == 2
    found = load(saved)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    if not processes.first:

        def full(path: Path, named: object) -> None:
            raise OSError(28, "No space left on device")

        shards.write = full
    try:
        store.save(2, tensors, {}, {"grid": "g"}, None)
    except CheckpointError as error:
        print(f"rank {processes.rank}: {error}", flush=True)
    assert store.steps() == [1]


if __name__ == "__main__":
    main()
