"""Started by mpirun from test_statistics: statistics, verification and an index by several processes."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from smoe_hpc.io import open_store
from smoe_hpc.io.index import write_index
from smoe_hpc.io.samples import Split
from smoe_hpc.io.statistics import statistics_of
from smoe_hpc.io.verify import verify
from smoe_hpc.launch.team import find_team

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
with find_team() as team:
    write_index(folder, team)
    found = statistics_of(open_store(folder), Split("2019-01-01/2019-12-31"), team=team)
    report = verify(folder, team)
told = {"world": team.world, "statistics": asdict(found), "ok": report.ok, "samples": report.samples}
(out / f"{team.rank}.json").write_text(json.dumps(told))
