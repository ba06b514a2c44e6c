"""Started several times by test_team: gathers values of unequal size, and leaves."""

import json
import sys

from smoe_hpc.launch.communicator import find_communicator

with find_communicator() as communicator:
    first = communicator.gather({"rank": communicator.rank, "rows": list(range(communicator.rank, 7, communicator.world))})
    if "fail" in sys.argv and communicator.rank == 1:
        raise SystemExit(3)
    second = communicator.gather(None)
    assert second == [None] * communicator.world
rows = sorted(row for part in first for row in part["rows"])
assert [part["rank"] for part in first] == list(range(communicator.world))
sys.stdout.write(
    json.dumps({"rank": communicator.rank, "world": communicator.world, "rows": rows, "torch": "torch" in sys.modules}) + "\n"
)
