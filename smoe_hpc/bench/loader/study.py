"""How fast samples come from the store: each backend, type and order, beside bare reads of the same files and beside what a
user would write with xarray or h5py.

Every line of the table is a process of its own (:mod:`smoe_hpc.bench.loader.case`) over the same synthetic files.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from smoe_hpc.bench.loader.baselines import BASELINES
from smoe_hpc.bench.loader.case import Case, Outcome, measure
from smoe_hpc.errors import DataError, RunError
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.statistics.channel_statistics import compute_statistics
from smoe_hpc.io.store.multi_file import open_store
from smoe_hpc.io.synthetic.era5 import synthesize

START = 2015
COLUMNS = (
    "reader", "type", "order", "verify", "batch", "cache", "samples/s", "MB/s", "of raw", "CPU ms", "MB", "ring MB",
    "grew MB", "start s",
)  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """What is measured.

    Args:
        folder: where the synthetic data go (and stay: a second run finds them there).
        grid: (H, W).
        days: of data, 6-hourly, 38 channels.
        dtypes: types of store.
        orders: of the samples.
        backends: of the loader.
        verifies: which checksums are verified, "sampled" or "all" (the first backend, first type and first order only).
        batch: samples a batch.
        batches: timed for each line.
        long: batches of one more line, over which memory must not grow; 0 leaves it out.
        workers: threads or processes of every reader.
        prefetch: batches read ahead.
        device: where batches are wanted.
        cold: also with nothing in the page cache.
        baselines: also xarray and h5py with torch's DataLoader (float32, first order; a quarter as many batches): of other
            types they would have to make values themselves.
    """

    folder: Path
    grid: tuple[int, int] = (128, 256)
    days: int = 120
    dtypes: Sequence[str] = ("float32", "int16")
    orders: Sequence[str] = ("global", "blocks")
    backends: Sequence[str] = ("threads", "dali")
    verifies: Sequence[str] = ("all",)
    batch: int = 32
    batches: int = 20
    long: int = 0
    workers: int = 2
    prefetch: int = 2
    device: str = "cpu"
    cold: bool = True
    baselines: bool = True


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        dtype: type of the store.
        outcome: what was measured.
        of_raw: bytes a second over those of the bare reads of the same files, order and cache.
    """

    dtype: str
    outcome: Outcome
    of_raw: float | None = field(default=None)

    def cells(self) -> list[str]:
        """As `COLUMNS` has it."""
        case, result = self.outcome.case, self.outcome
        kind = "-" if case.reader == "raw" else "decoded" if case.decoded else "as stored"
        return [
            case.reader,
            self.dtype,
            case.order,
            case.verify,
            kind,
            case.cache,
            f"{result.samples_per_second:.1f}",
            f"{result.read_mb_per_second:.0f}",
            "-" if self.of_raw is None else f"{100 * self.of_raw:.0f} %",
            f"{result.processor_ms_per_sample:.2f}",
            f"{result.peak_mb:.0f}",
            f"{result.allowed_mb:.0f}",
            f"{result.growth_mb:.0f}",
            f"{result.start_seconds:.1f}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"dtype": self.dtype, "of_raw": self.of_raw, **asdict(self.outcome)}


def loader_study(scope: Scope, say: Callable[[str], None]) -> list[Line]:
    """Measure all that the scope asks for; what each line takes is said as it goes.

    Raises:
        DataError: no room for the data, or other data in the folder.
        RunError: a measurement that failed, with its error.
    """
    lines: list[Line] = []
    for dtype in scope.dtypes:
        base = _base(scope, dtype, say)
        for cache in ("warm", "cold") if scope.cold else ("warm",):
            for order in scope.orders:
                here = replace(base, order=order, cache=cache)
                raw = _run(replace(here, reader="raw", decoded=False), say)
                lines.append(Line(dtype, raw))
                for case in _cases(scope, here, dtype):
                    outcome = _run(case, say)
                    lines.append(Line(dtype, outcome, outcome.read_mb_per_second / raw.read_mb_per_second))
    if scope.long:
        case = replace(_base(scope, scope.dtypes[0], say), reader=scope.backends[0], decoded=False, batches=scope.long)
        lines.append(Line(scope.dtypes[0], _run(case, say)))
    return lines


def _cases(scope: Scope, here: Case, dtype: str) -> list[Case]:
    cases = [replace(here, reader=backend, decoded=decoded) for backend in scope.backends for decoded in (False, True)]
    first = dtype == scope.dtypes[0] and here.order == scope.orders[0]
    if first and here.cache == "warm":
        cases += [replace(here, reader=scope.backends[0], decoded=False, verify=verify) for verify in scope.verifies]
    if scope.baselines and dtype == "float32" and here.order == scope.orders[0]:
        cases += [replace(here, reader=name, batches=max(here.batches // 4, 2)) for name in BASELINES]
    return cases


def _base(scope: Scope, dtype: str, say: Callable[[str], None]) -> Case:
    """Data and statistics of a type, made if they are not there."""
    folder = scope.folder / dtype
    synthesize(folder, scope.grid, 1, 6, start=START, days=scope.days, dtype=dtype)
    statistics, store = folder / "bench_statistics.json", open_store(folder)
    if store.num_samples < 16 + scope.batch:
        raise DataError(f"--days {scope.days}: {store.num_samples} fields do not make a batch of {scope.batch}; take more")
    files = len(list(folder.glob("*.h5")))
    if scope.baselines and dtype == "float32" and files > 1:
        raise DataError(f"--days {scope.days} make {files} files, and xarray and h5py read one; take less, or --no-baselines")
    if not statistics.exists():
        compute_statistics(store, Split(f"{START}-01-01/{START}-01-08")).save(statistics)
        say(f"{folder}: {store.num_samples} fields, {sum(p.stat().st_size for p in folder.glob('*.h5')) / 1e6:,.0f} MB")
    return Case(
        "raw",
        str(folder),
        str(statistics),
        batch=scope.batch,
        batches=scope.batches,
        workers=scope.workers,
        prefetch=scope.prefetch,
        device=scope.device,
    )


def _run(case: Case, say: Callable[[str], None]) -> Outcome:
    """Measure in a process of its own. A server that has imported everything forks it: imports would take longer than most
    measurements.

    Raises:
        RunError: it failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__module__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure_into, args=(case, there), name="smoe-bench-case")
    process.start()
    there.close()
    try:
        outcome = here.recv()
    except EOFError:
        outcome = None
    process.join()
    if not isinstance(outcome, Outcome):
        killed = "; it may have been killed for want of memory" if (process.exitcode or 0) < 0 else ""
        reason = outcome or f"the process ended with status {process.exitcode}{killed}"
        raise RunError(f"measuring {case.reader} on {case.data} failed: {reason}")
    say(f"{case.reader}, {case.order}, {case.cache}: {outcome.samples_per_second:.1f} samples/s")
    return outcome


def _measure_into(case: Case, answer: Connection) -> None:
    try:
        answer.send(measure(case))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
        raise


def needed_mb_per_second(scope: Scope, dtype: str, samples_per_second: float) -> float:
    """What a GPU that trains so many samples a second reads of a store, each sample by itself (order "global")."""
    height, width = scope.grid
    bytes_each = {"float32": 4, "float16": 2, "int16": 2}[dtype]
    return (3 * 38 + 3) * height * width * bytes_each * samples_per_second / 1e6
