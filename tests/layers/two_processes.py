"""What tests of two processes have them do, in one start: ``two_processes.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.layers import branches, sharding


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    for part in (branches, sharding):
        torch.save(part.of_process(rank), folder / f"{part.__name__.rpartition('.')[2]}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch 2.13 now and then aborts an interpreter that ends after FSDP ("terminate called ...")


if __name__ == "__main__":
    main()
