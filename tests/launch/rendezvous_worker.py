"""Started several times by test_rendezvous: meets the others, adds up the ranks, and leaves."""

import json
import os
import sys
from dataclasses import asdict

import torch

from smoe_hpc.launch.rendezvous import init_distributed, shutdown

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
before = [os.environ.get(name) for name in NAMES]
ranks = init_distributed("cpu")
if "fail" in sys.argv and ranks.rank == 1:
    sys.exit(3)
total = torch.tensor(float(ranks.rank + 1))
torch.distributed.all_reduce(total)
assert all(os.environ[name] == str(value) for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world)))
shutdown()
assert [os.environ.get(name) for name in NAMES] == before, "shutdown takes back what was set"
if "again" in sys.argv:
    assert init_distributed("cpu").rank == ranks.rank
    torch.distributed.all_reduce(total)
    shutdown()
sys.stdout.write(json.dumps({**asdict(ranks), "total": total.item()}) + "\n")
