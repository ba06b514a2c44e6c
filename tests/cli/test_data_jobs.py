"""Data verbs that are asked to stop: when they look, what they leave, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoe_hpc.cli.data_jobs import DataStopped, data_job
from smoe_hpc.errors import DataError
from smoe_hpc.io import open_store
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.channel_statistics import compute_statistics
from smoe_hpc.io.synthetic.era5 import synthesize

ROOT = Path(__file__).resolve().parents[2]
SYNTHESIZE = (sys.executable, "-m", "smoe_hpc", "data", "synthesize")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_synthesis_leaves_no_half_year_and_goes_on(tmp_path: Path) -> None:
    arguments = [*SYNTHESIZE, str(tmp_path), "--grid", "64x128", "--days", "300"]
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert "synthesizing samples: stopped as asked (SIGUSR1); what is whole is kept, and the same command" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_statistics_stop_between_fields(tmp_path: Path) -> None:
    made = synthesize(tmp_path, (16, 32), days=3)
    seen: list[int] = []

    def go_over_fields() -> None:
        with data_job("going over fields") as (_, report):

            def stop_at_three(done: int, total: int) -> None:
                seen.append(done)
                if done == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)
                report(done, total)

            compute_statistics(open_store(made.paths[0]), Split("2015-01-01/2015-01-03"), progress=stop_at_three)

    with pytest.raises(DataStopped, match=r"going over fields: stopped as asked \(SIGUSR1\)") as caught:
        go_over_fields()
    assert seen[-1] == 3
    assert caught.value.exit_status == 75


def test_a_signal_where_nobody_looked_is_obeyed_at_the_end() -> None:
    with pytest.raises(DataStopped, match="SIGTERM"), data_job("work"):
        os.kill(os.getpid(), signal.SIGTERM)
    with data_job("work") as (communicator, report):
        report(1, 1)
    assert communicator.world == 1


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(DataError, match=r"^no space$") as caught, data_job("work"):
        raise DataError("no space")
    assert not isinstance(caught.value, DataStopped)


def test_one_rank_that_is_asked_stops_all(tmp_path: Path) -> None:
    """Two processes; the second alone hears the signal, while the first may already wait for it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from smoe_hpc.cli.data_jobs import DataStopped, data_job\n"
        "from smoe_hpc.io.synthetic.era5 import synthesize\n"
        "try:\n"
        "    with data_job('work') as (communicator, report):\n"
        "        if communicator.rank:\n"
        "            os.kill(os.getpid(), signal.SIGUSR2)\n"
        f"        options = {{'start': 2014, 'years': 2, 'communicator': communicator, 'progress': report}}\n"
        f"        synthesize({str(tmp_path / 'data')!r}, (16, 32), **options)\n"
        "except DataStopped as error:\n"
        "    sys.stdout.write(f'{error}\\n')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("work: stopped as asked (SIGUSR2)") == 2
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["synthetic_2014.h5"], "the first rank's year is whole"
