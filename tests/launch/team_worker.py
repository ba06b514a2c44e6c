"""Started several times by test_team: gathers values of unequal size, and leaves."""

import json
import sys

from smoe_hpc.launch.team import find_team

with find_team() as team:
    first = team.gather({"rank": team.rank, "rows": list(range(team.rank, 7, team.world))})
    if "fail" in sys.argv and team.rank == 1:
        raise SystemExit(3)
    second = team.gather(None)
    assert second == [None] * team.world
rows = sorted(row for part in first for row in part["rows"])
assert [part["rank"] for part in first] == list(range(team.world))
sys.stdout.write(json.dumps({"rank": team.rank, "world": team.world, "rows": rows, "torch": "torch" in sys.modules}) + "\n")
