"""The benchmark of the loader: what its readers deliver and read, and what its figures are made of."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smoe_hpc.bench.loader import study
from smoe_hpc.bench.loader.baselines import BASELINES
from smoe_hpc.bench.loader.case import INPUTS, LEAD, TARGETS, Case, batches_of
from smoe_hpc.bench.loader.raw_reads import bytes_read, raw_reads
from smoe_hpc.bench.loader.study import COLUMNS, Line, Scope, loader_study, needed_mb_per_second
from smoe_hpc.bench.processes import MemoryWatch, descendants, memory_bytes, processor_seconds
from smoe_hpc.errors import DataError, RunError
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.statistics.channel_statistics import Statistics
from smoe_hpc.io.store.multi_file import open_store

GRID, FIELD_BYTES = (16, 32), 16 * 32 * 4
RIVAL = "h5py + DataLoader"
QUICK = {"grid": GRID, "days": 14, "dtypes": ("float32",), "batch": 4, "batches": 8, "workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[Line]:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "BASELINES", {RIVAL: BASELINES[RIVAL]})  # each takes seconds to start its workers
        found = loader_study(Scope(folder, **QUICK, backends=("threads",), verifies=("all",), cold=False, long=40), said.append)
    assert len([line for line in said if line.endswith("samples/s")]) == len(found)
    return found


@pytest.fixture(scope="module")
def samples(lines: list[Line]) -> Samples:
    case = lines[0].outcome.case
    return Samples(open_store(case.data), Window(INPUTS, (LEAD,)), None, None, TARGETS, Statistics.load(case.statistics))


def _read(line: Line) -> float:
    """Distinct bytes of a line's timed batches."""
    return line.outcome.read_mb_per_second * line.outcome.seconds * 1e6


def test_every_reader_is_measured_in_every_order(lines: list[Line]):
    cases = [line.outcome.case for line in lines]
    assert [(case.reader, case.order, case.decoded, case.verify) for case in cases] == [
        ("raw", "global", False, "off"),
        ("threads", "global", False, "off"),
        ("threads", "global", True, "off"),
        ("threads", "global", False, "all"),
        (RIVAL, "global", True, "off"),
        ("raw", "blocks", False, "off"),
        ("threads", "blocks", False, "off"),
        ("threads", "blocks", True, "off"),
        ("threads", "global", False, "off"),  # the long one
    ]
    assert [case.batches for case in cases] == [8, 8, 8, 8, 2, 8, 8, 8, 40]


def _check_figures(line: Line) -> None:
    """Of one line: samples as many as asked for, everything finite and of the right sign."""
    outcome, case = line.outcome, line.outcome.case
    assert outcome.samples_per_second * outcome.seconds == pytest.approx(case.batches * case.batch)
    assert 0 < outcome.start_seconds < 60
    assert 0 < outcome.processor_ms_per_sample < 10_000
    assert (line.of_raw is None) == (case.reader == "raw" or case.batches == 40)
    assert line.of_raw is None or 0 < line.of_raw < float("inf")
    most = (3 * 38 + 3) * FIELD_BYTES * case.batch * (case.prefetch + 1) / 1e6
    assert 0 < outcome.allowed_mb <= most
    assert 0 <= outcome.growth_mb <= outcome.peak_mb + 1e-6 < 2000
    assert [len(line.cells()), line.as_dict()["case"]["reader"]] == [len(COLUMNS), case.reader]


def test_figures_are_whole(lines: list[Line]):
    for line in lines:
        _check_figures(line)


def test_memory_does_not_grow_with_the_batches(lines: list[Line]):
    long = lines[-1].outcome
    read = _read(lines[-1]) / 1e6
    assert long.growth_mb < read / 4, "as if batches were kept"


def test_readers_of_one_order_read_the_same_bytes(lines: list[Line]):
    for order in ("global", "blocks"):
        of_order = [line for line in lines if line.outcome.case.order == order and line.outcome.case.batches == 8]
        assert len({round(_read(line)) for line in of_order}) == 1


def test_blocks_read_less(lines: list[Line]):
    shuffled, blocks = (
        next(_read(line) for line in lines if line.outcome.case.order == order) for order in ("global", "blocks")
    )
    assert blocks < 0.8 * shuffled
    assert shuffled <= (3 * 38 + 3) * FIELD_BYTES * 8 * 4


def test_raw_reads_take_those_bytes_from_the_files(samples: Samples):
    items = samples.epoch_ids(0, 0)[:24].reshape(6, 4)
    before = _characters_read()
    list(raw_reads(samples.table, items, workers=2))
    of_all = _characters_read() - before
    before = _characters_read()
    list(raw_reads(samples.table, items[:1], workers=2))  # and where in the file they lie, as often
    of_first = _characters_read() - before
    wanted = sum(bytes_read(samples.table, part) for part in items[1:])
    assert of_all - of_first == pytest.approx(wanted, rel=0.02)


def _characters_read() -> int:
    content = Path("/proc/self/io").read_text()
    return int(content.split("rchar:")[1].split()[0])


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_deliver_what_the_loader_delivers(baseline: str, samples: Samples):
    items = samples.epoch_ids(0, 0)[:8].reshape(2, 4)
    assert samples.statistics is not None
    mean, std = samples.statistics.select(samples.store.channels)
    (path,) = samples.store.folder.glob("*.h5")
    places = samples.store.channel_indices(TARGETS)
    dataset = BASELINES[baseline](path, samples.input_rows, samples.target_rows, places, mean, std)
    case = Case("threads", str(samples.store.folder), "", batch=4)
    with contextlib.ExitStack() as held:
        for part, batch in zip(items, batches_of(case, samples, items, torch.device("cpu"), held), strict=True):
            theirs = [torch.stack(fields) for fields in zip(*(dataset[int(item)] for item in part), strict=True)]
            torch.testing.assert_close(batch.inputs, theirs[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(batch.targets, theirs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.dali
def test_dali_is_measured_like_the_others(folder: Path, lines: list[Line]):
    scope = Scope(folder, **QUICK, orders=("global",), backends=("dali",), verifies=(), cold=False, baselines=False)
    found = loader_study(scope, lambda text: None)
    cases = [line.outcome.case for line in found]
    assert [(case.reader, case.decoded) for case in cases] == [("raw", False), ("dali", False), ("dali", True)]
    for line in found:
        _check_figures(line)
    assert {round(_read(line)) for line in found} == {round(_read(lines[0]))}


def test_packed_data_are_read_warm_and_cold_without_baselines(folder: Path):
    quick = QUICK | {"dtypes": ("int16",), "batches": 4}
    found = loader_study(Scope(folder, **quick, orders=("blocks",), backends=("threads",), verifies=()), lambda text: None)
    assert [(line.outcome.case.reader, line.outcome.case.cache) for line in found] == [
        (reader, cache) for cache in ("warm", "cold") for reader in ("raw", "threads", "threads")
    ]
    assert found[0].outcome.allowed_mb <= (3 * 38 + 3) * FIELD_BYTES / 2 * 4 * 3 / 1e6


def test_a_batch_that_the_data_do_not_fill_is_refused_each_time(folder: Path, lines: list[Line]):
    with pytest.raises(DataError, match=r"--days 14: 56 fields do not make a batch of 64"):
        loader_study(Scope(folder, **QUICK | {"batch": 64}), lambda text: None)  # with data and statistics there already


def test_epochs_that_batches_do_not_fill_go_on(lines: list[Line]):
    case = replace(lines[1].outcome.case, batch=30, batches=4)  # one batch of the 42 samples an epoch
    outcome = study._run(case, lambda text: None)
    assert outcome.samples_per_second * outcome.seconds == pytest.approx(4 * 30)
    assert outcome.allowed_mb > 10
    assert outcome.peak_mb >= 0.5 * outcome.allowed_mb, "buffers count, however short the measurement"


def test_other_data_in_the_folder_are_refused(folder: Path, lines: list[Line]):
    with pytest.raises(DataError, match="synthetic_2015"):
        loader_study(Scope(folder, **QUICK | {"days": 15}), lambda text: None)


def test_a_failing_case_says_why(lines: list[Line]):
    case = lines[1].outcome.case
    with pytest.raises(RunError, match=r"measuring threads on .*/nowhere failed: DataError: .*nowhere"):
        study._run(replace(case, data=f"{case.data}/nowhere"), lambda text: None)
    with pytest.raises(RunError, match=r"failed: DataError: .*loader\.prefetch=0"):
        study._run(replace(case, prefetch=0), lambda text: None)


def test_what_a_gpu_needs():
    scope = Scope(Path("nowhere"))
    assert needed_mb_per_second(scope, "float32", 100) == pytest.approx(117 * 128 * 256 * 4 * 100 / 1e6)
    assert needed_mb_per_second(scope, "int16", 100) == pytest.approx(117 * 128 * 256 * 2 * 100 / 1e6)


BUSY = """
import sys, time
held = bytearray(b"x") * 50_000_000
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
print("done", flush=True)
sys.stdin.read()
"""
WITH_A_CHILD_OF_ITS_OWN = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"], check=True)
print("done", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _child(program: str):
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        yield child
        child.stdin.close()
        child.wait(30)


def test_a_childs_time_and_memory_count():
    with MemoryWatch(every=0.02) as watch:
        before = processor_seconds()
        with _child(BUSY) as child:
            assert child.pid in descendants(os.getpid())
            living = processor_seconds() - before
            assert memory_bytes(child.pid) >= 50e6
            assert watch.look() - watch.start >= 50e6
        ended = processor_seconds() - before
        assert memory_bytes(child.pid) == 0
    assert 0.29 <= living <= ended + 0.03 < 10
    assert watch.peak - watch.start >= 50e6, "the peak outlives the child"


def test_a_grandchild_that_has_ended_counts():
    before = processor_seconds()
    with _child(WITH_A_CHILD_OF_ITS_OWN):
        assert processor_seconds() - before >= 0.28


def test_the_watch_looks_by_itself():
    with MemoryWatch(every=0.02) as watch:
        held = mmap.mmap(-1, 60_000_000)  # fresh from the system: an allocator may have some left
        held.write(bytes([1]) * len(held))
        for _ in range(100):
            time.sleep(0.02)
            if watch.peak - watch.start >= 55e6:
                break
        assert watch.peak - watch.start >= 55e6
        assert held[-1] == 1
