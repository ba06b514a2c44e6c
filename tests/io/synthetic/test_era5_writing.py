"""Folders of synthetic years: what is in the files, who shares the work, and what several starts do to each other."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.errors import DataError
from smoe_hpc.io import Store
from smoe_hpc.io.channels import CONSTANTS, RT38
from smoe_hpc.io.checks.inspect import describe_store
from smoe_hpc.io.store.index import read_index
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.io.store.transforms import apply
from smoe_hpc.io.synthetic.era5 import NOTICE, SyntheticEarth, folder, global_grid, synthesize
from tests.launch.test_rendezvous import start

SMALL = {"grid": (16, 32), "days": 3}


class Ranks:
    """R threads as a communicator."""

    def __init__(self, world: int) -> None:
        self._barrier, self._values = threading.Barrier(world, timeout=60), [None] * world
        self.members = [_Member(self, rank, world) for rank in range(world)]

    def run(self, action) -> list:
        outcomes: list = [None] * len(self.members)

        def one(member) -> None:
            try:
                outcomes[member.rank] = action(member)
            except DataError as error:
                outcomes[member.rank] = error

        threads = [threading.Thread(target=one, args=(member,)) for member in self.members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


class _Member:
    def __init__(self, ranks: Ranks, rank: int, world: int) -> None:
        self._ranks, self.rank, self.world = ranks, rank, world

    def gather(self, value):
        self._ranks._values[self.rank] = value
        self._ranks._barrier.wait()
        values = list(self._ranks._values)
        self._ranks._barrier.wait()
        return values


def contents(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(where.glob("*.h5"))}


def test_a_file_holds_what_the_earth_says_and_says_that_it_is_synthetic(tmp_path):
    made = synthesize(tmp_path, **SMALL, seed=3)
    assert [path.name for path in made.paths] == ["synthetic_2015.h5"]
    assert (made.written, made.samples) == (made.paths, 12)
    store, earth = Store(made.paths[0]), SyntheticEarth(global_grid(16, 32), seed=3)
    assert store.channels == [channel.name for channel in RT38]
    assert store.units == [channel.units for channel in RT38]
    assert tuple(store.constants) == CONSTANTS
    assert store.transforms == [channel.transform for channel in RT38]
    for row, when in enumerate(store.coords["time"]):
        fields = earth.fields(when)
        np.testing.assert_array_equal(store.read([row])[0, :37], fields[:37])
        np.testing.assert_array_equal(store.read([row])[0, 37], apply("log:0.001", fields[37]).astype(np.float32))
    assert store.attributes["synthetic"] == NOTICE
    assert "not ERA5" in NOTICE
    assert read_index(tmp_path).about["synthetic"] is True
    assert NOTICE in str(describe_store(made.paths[0]))


def test_years_are_calendar_years_and_a_part_is_its_first_days(tmp_path):
    files = folder.plan_files(tmp_path, 2.25, None, 2015, 12, {})
    assert [len(file.times) for file in files] == [730, 732, 182]  # 2016 has a 29th of February
    assert [str(file.times[0]) for file in files] == [f"{year}-01-01T00:00:00" for year in (2015, 2016, 2017)]
    (few,) = folder.plan_files(tmp_path, 0.1, None, 2016, 6, {})
    assert len(few.times) == 37 * 4
    across = folder.plan_files(tmp_path, 2, 400, 2015, 24, {})
    assert [len(file.times) for file in across] == [365, 35]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5}, "a step of 5 hours does not divide the day"),
        ({"days": 0}, "0 days hold no time"),
        ({"days": None, "years": 0.0}, r"0.0 years hold no time"),
        ({"days": None, "years": 0.001}, "less than a day"),
        ({"start": 0}, "do not lie within 1..9999"),
        ({"grid": (8, 32)}, "give at least 16x32"),
        ({"channels": "rt83"}, "did you mean 'rt38'"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"compression": "zsdt"}, "zstd"),
        ({"seed": -1}, "negative"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        synthesize(tmp_path / "out", **{**SMALL, **options})
    assert not (tmp_path / "out").exists()


def test_fields_do_not_depend_on_the_first_year_the_step_or_the_length(tmp_path):
    long = synthesize(tmp_path / "long", grid=(16, 32), days=367, step=24)
    late = synthesize(tmp_path / "late", grid=(16, 32), days=2, step=12, start=2016)
    first, second = Store(long.paths[1]), Store(late.paths[0])
    assert first.coords["time"].tolist() == second.coords["time"][::2].tolist()
    np.testing.assert_array_equal(first.read([0, 1]), second.read([0, 2]))


@pytest.mark.parametrize("world", [2, 3])
def test_the_files_do_not_depend_on_the_ranks(tmp_path, world):
    options = {"grid": (16, 32), "years": 2.01, "step": 24}
    synthesize(tmp_path / "alone", **options)
    made = Ranks(world).run(lambda member: synthesize(tmp_path / "shared", **options, communicator=member))
    assert [len(one.written) for one in made] == [3] * world
    assert contents(tmp_path / "alone") == contents(tmp_path / "shared")
    digests = [[entry.digest for entry in read_index(tmp_path / name).files] for name in ("alone", "shared")]
    assert digests[0] == digests[1]
    assert open_store(tmp_path / "shared").num_samples == 365 + 366 + 4


def test_an_error_of_one_rank_is_everybodys(tmp_path):
    (tmp_path / "synthetic_2016.h5").write_bytes(b"somebody else's")
    outcomes = Ranks(3).run(lambda member: synthesize(tmp_path, grid=(16, 32), years=3, step=24, communicator=member))
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "synthetic_2016.h5 holds other data (not synthetic, or damaged)" in str(outcomes[0])
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic_2016.h5"]


def test_what_is_there_is_kept_and_what_is_missing_made(tmp_path):
    options = {"grid": (16, 32), "years": 2.0, "step": 24}
    made = synthesize(tmp_path, **options)
    whole, stamps = contents(tmp_path), [path.stat().st_mtime_ns for path in made.paths]
    assert synthesize(tmp_path, **options).written == ()
    assert [path.stat().st_mtime_ns for path in made.paths] == stamps
    made.paths[1].unlink()
    (tmp_path / "index.json").unlink()
    assert synthesize(tmp_path, **options).written == (made.paths[1],)
    assert contents(tmp_path) == whole
    (tmp_path / "index.json").unlink()
    synthesize(tmp_path, **options)
    assert len(read_index(tmp_path).files) == 2
    assert len(synthesize(tmp_path, **{**options, "start": 2017, "years": 0.1}).written) == 1  # the folder grows
    assert len(read_index(tmp_path).files) == 3


def test_other_data_are_refused_and_replaced_only_when_asked(tmp_path):
    synthesize(tmp_path, **SMALL)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r'synthetic_2015.h5 holds other data .*"seed": 0.*"seed": 1.*--overwrite'):
        synthesize(tmp_path, **SMALL, seed=1)
    with pytest.raises(DataError, match=r"synthetic_2015.h5 lies in the same folder and is of another kind"):
        synthesize(tmp_path, **SMALL, seed=1, start=2016)
    assert contents(tmp_path) == before
    synthesize(tmp_path, **SMALL, seed=1, overwrite=True)
    assert contents(tmp_path) != before
    open_store(tmp_path).read([0])


@pytest.mark.parametrize("dtype", ["float16", "int16"])
def test_small_types_hold_every_channel(tmp_path, dtype):
    exact = Store(synthesize(tmp_path / "float32", **SMALL).paths[0])
    packed = Store(synthesize(tmp_path / dtype, **SMALL, dtype=dtype).paths[0])
    assert packed.encoding.dtype == dtype
    values = exact.read(range(12))
    error = np.abs(packed.read(range(12)) - values).max(axis=(0, 2, 3))
    for channel, largest in zip(RT38, error, strict=True):
        assert largest < (channel.high - channel.low) / (60000 if dtype == "int16" else 2000), channel.name


def test_compressed_files_hold_the_same(tmp_path):
    plain = Store(synthesize(tmp_path / "plain", **SMALL).paths[0])
    packed = Store(synthesize(tmp_path / "gzip", **SMALL, compression="gzip").paths[0])
    np.testing.assert_array_equal(plain.read(range(12)), packed.read(range(12)))
    assert packed.path.stat().st_size < plain.path.stat().st_size


def test_several_starts_into_one_folder(tmp_path):
    script = (
        "import sys\nfrom smoe_hpc.io.synthetic.era5 import synthesize\n"
        "synthesize(sys.argv[1], grid=(16, 32), years=2, step=24)"
    )
    starts = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "shared")]) for _ in range(3)]
    assert [one.wait(timeout=120) for one in starts] == [0, 0, 0]
    synthesize(tmp_path / "alone", grid=(16, 32), years=2, step=24)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        "index.json",
        "synthetic_2015.h5",
        "synthetic_2016.h5",
    ]
    assert open_store(tmp_path / "shared").num_samples == 731


def test_a_file_that_another_start_finished_first_is_kept(tmp_path):
    (file,) = folder.plan_files(tmp_path, 2, 3, 2015, 6, {"seed": 0})
    ours = synthesize(tmp_path / "ours", **SMALL).paths[0]
    (same,) = folder.plan_files(tmp_path, 2, 3, 2015, 6, {})
    same = folder.YearFile(same.path, same.times, str(Store(ours).attributes["recipe"]))
    with folder.publish(same, False) as own:
        os.link(ours, own)
        same.path.write_bytes(ours.read_bytes())
        theirs = same.path.stat().st_ino
    assert same.path.stat().st_ino == theirs
    with pytest.raises(DataError, match="holds other data"), folder.publish(file, False) as own:
        os.link(ours, own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "synthetic_2015.h5"]


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path):
    old, fresh = (tmp_path / f"synthetic_2015.h5.{name}.partial" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    synthesize(tmp_path, **SMALL)
    assert (old.exists(), fresh.exists()) == (False, True)
    assert open_store(tmp_path).num_samples == 12


def test_too_little_space_is_said_before_anything_is_written(small_disk):
    with pytest.raises(DataError, match=r"no space in .*: 1 files need .* MB and .* MB are free; .*Nothing was written"):
        synthesize(small_disk / "out", grid=(64, 128), days=30)
    assert list((small_disk / "out").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_half_written(small_disk):
    def fill(done: int, total: int) -> None:
        with contextlib.suppress(OSError), open(small_disk / "somebody_else", "ab", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass

    with pytest.raises(DataError, match="no space to write"):
        synthesize(small_disk / "out", grid=(64, 128), days=20, dtype="int16", compression="gzip", progress=fill)
    assert list((small_disk / "out").iterdir()) == []


# The command


def test_the_command_writes_and_says_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["data", "synthesize", "out", "--grid", "16x32", "--days", "2", "--dtype", "int16"]
    for how in ("written", "was there already"):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert "SYNTHETIC" in done.stdout
        assert f"synthetic_2015.h5: 0.3 MB, {how}" in done.stdout
    done = CliRunner().invoke(app, ["data", "synthesize", "out", "--grid", "16by32"])
    assert done.exit_code == 2
    assert "--grid 16by32: give rows and columns, as in 128x256" in done.output
    told = CliRunner().invoke(app, ["data", "inspect", "out/synthetic_2015.h5"])
    assert "SYNTHETIC" in told.stdout


@pytest.mark.mpi
def test_mpirun_shares_the_years(tmp_path):
    def run(*command: str):
        arguments = ("data", "synthesize", str(tmp_path / command[0]), "--grid", "16x32", "--years", "2", "--step", "24")
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return start(*command[1:], sys.executable, "-m", "smoe_hpc", *arguments, **as_root)

    mpirun = ("mpirun", "--oversubscribe", "-n", "2")
    for done in (run("alone"), run("shared", *mpirun)):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written") == 2
    assert contents(tmp_path / "alone") == contents(tmp_path / "shared")
    (tmp_path / "alone" / "synthetic_2016.h5").write_bytes(b"damaged")
    refused = run("alone", *mpirun)
    assert refused.returncode == 2
    assert refused.stderr.count("holds other data") == 1
