"""Reads a store through DALI in a process of its own: ``reader.py STORE BATCHES``; prints what the tests ask about.

After the first batch it prints the ids of its worker processes and its folder, and then waits for a line on its input
before each further batch. DALI's workers import this file too: what they do not need is imported in `main`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    from smoe_hpc.io import Store
    from smoe_hpc.io.loading.loader import Loader
    from smoe_hpc.io.loading.samples import Samples
    from smoe_hpc.io.sampling.windows import Window

    samples = Samples(Store(sys.argv[1]), Window((-1, 0), 1))
    with Loader(samples, backend="dali", workers=2) as loader:
        batches = loader.train(0, 0, global_batch=2)
        print(next(batches).ids.tolist(), flush=True)
        (folder,) = Path(tempfile.gettempdir()).glob(f"smoe-dali-{os.getpid()}-*")
        print(json.dumps([loader.processes, str(folder)]), flush=True)
        for _ in range(int(sys.argv[2])):
            sys.stdin.readline()
            print(next(batches).ids.tolist(), flush=True)


if __name__ == "__main__":
    main()
