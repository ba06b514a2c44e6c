"""Started several times by test_rendezvous: meets the others, adds up the ranks, and leaves."""

import contextlib
import json
import os
import socket
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from smoe_hpc.launch.rendezvous import init_distributed, shutdown


def listening() -> list[str]:
    """Addresses on which this process listens."""
    held = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            held.add(os.readlink(f"/proc/self/fd/{number}"))
    found = []
    for table, words in (("tcp", 1), ("tcp6", 4)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:
                packed = struct.pack(f"={words}I", *(int(local[8 * k : 8 * k + 8], 16) for k in range(words)))
                found.append(socket.inet_ntop(socket.AF_INET if words == 1 else socket.AF_INET6, packed))
    return found


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
before = [os.environ.get(name) for name in NAMES]
ranks = init_distributed("cpu")
if "fail" in sys.argv and ranks.rank == 1:
    sys.exit(3)
total = torch.tensor(float(ranks.rank + 1))
torch.distributed.all_reduce(total)
addresses = listening()
assert all(os.environ[name] == str(value) for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world)))
shutdown()
assert [os.environ.get(name) for name in NAMES] == before, "shutdown takes back what was set"
if "again" in sys.argv:
    assert init_distributed("cpu").rank == ranks.rank
    torch.distributed.all_reduce(total)
    shutdown()
sys.stdout.write(json.dumps({**asdict(ranks), "total": total.item(), "listening": addresses}) + "\n")
