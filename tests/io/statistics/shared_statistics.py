"""Started by mpirun from test_statistics: statistics, verification and an index by several processes."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from smoe_hpc.io import open_store
from smoe_hpc.io.checks.verify import verify
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.channel_statistics import statistics_of
from smoe_hpc.io.store.index_writing import write_index
from smoe_hpc.launch.communicator import find_communicator

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
with find_communicator() as communicator:
    write_index(folder, communicator)
    found = statistics_of(open_store(folder), Split("2019-01-01/2019-12-31"), communicator=communicator)
    report = verify(folder, communicator)
told = {"world": communicator.world, "statistics": asdict(found), "ok": report.ok, "samples": report.samples}
(out / f"{communicator.rank}.json").write_text(json.dumps(told))
