"""What a layer costs, beside everything that a user could take in its place: the study behind ``smoe-hpc bench layer``.

For each case (sizes and a kind of routing) and each part of the work (forward; forward + backward; the whole step with
routing loss and damping; selecting; planning) every way of computing it is measured by the clocks of
:mod:`smoe_hpc.bench.layer.timing`, and compared with the matrix rate and copy rate found in the same run. A way that runs
out of memory, or fails otherwise, gives a line that says so.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smoe_hpc.bench.layer.baselines import Call, Inputs, conv_gather, plain, published, quiet_compiler
from smoe_hpc.bench.layer.case import PARTS, Case, cases_of
from smoe_hpc.bench.layer.lines import OURS, OURS_DETERMINISTIC, Line, Study, with_rates, with_ratios
from smoe_hpc.bench.layer.ours import deterministic, make_inputs, ours, plan_of, runs_tiles
from smoe_hpc.bench.layer.routing import gate_values
from smoe_hpc.bench.layer.timing import Clock, first_line, working_on
from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.files.caches import own_folder
from smoe_hpc.kernels.build import libraries
from smoe_hpc.kernels.cuda import library
from smoe_hpc.kernels.padding import PADDINGS, check_padding
from smoe_hpc.kernels.planning.statistics import plan_statistics

BASELINES: dict[str, Callable[[str, Inputs], Call | None]] = {
    "conv + gather": conv_gather,
    "conv + gather, compiled": partial(conv_gather, compiled=True),
    "channels last": partial(conv_gather, last=True),
    "channels last, compiled": partial(conv_gather, last=True, compiled=True),
    "published": published,
    "plain convolution": plain,
}
SHORT_NAMES = ("dense", "compiled", "last", "last-compiled", "published", "plain")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _own_log() -> Path:
    """In a folder of this user: another may have made a link at a guessable name below /tmp."""
    return own_folder("bench") / "compiler.log"


@dataclass(frozen=True)
class Scope:
    """What is measured.

    Args:
        cases: sizes and routings.
        parts: of the work, of :data:`smoe_hpc.bench.layer.case.PARTS`; selecting and planning are always measured.
        baselines: of :data:`BASELINES`.
        modes: of our kernels: deterministic off, on or both.
        device: "cuda" or "cpu".
        dtype: of input and output, of :data:`DTYPES`.
        padding: "zeros", "periodic_longitude" or "sphere".
        repeats: calls a median is taken over, at most.
        seconds: about how long one measurement may take.
        cold: with the device's caches emptied before each call.
        threads: of a CPU.
        training_steps: of the gate, for learned routing.
        limit: seconds after which no further measurement starts; the rest is reported as not measured.
        compiler_log: where what torch.compile says goes.

    Raises:
        ConfigError: names that are not known, a device that is not there, a padding that a case's grid cannot have, a log
            that cannot be written, or ``SMOE_KERNELS`` with another value than native or torch.
    """

    cases: Sequence[Case] = cases_of("quick")
    parts: Sequence[str] = PARTS
    baselines: Sequence[str] = tuple(BASELINES)
    modes: Sequence[bool] = (False, True)
    device: str = "cuda"
    dtype: str = "bfloat16"
    padding: str = "zeros"
    repeats: int = 50
    seconds: float = 0.1
    cold: bool = True
    threads: int = 2
    training_steps: int = 200
    limit: float = float("inf")
    compiler_log: Path = field(default_factory=_own_log)

    def __post_init__(self) -> None:
        known: dict[str, tuple[Sequence[str], Collection[str]]] = {
            "part": (self.parts, PARTS),
            "baseline": (self.baselines, BASELINES),
            "type": ((self.dtype,), DTYPES),
            "padding": ((self.padding,), PADDINGS),
        }
        for what, (given, possible) in known.items():
            for name in given:
                if name not in possible:
                    raise ConfigError(f"{what} {name!r} is not known; choose among {', '.join(possible)}")
        for case in self.cases:
            check_padding(self.padding, case.shape.grid, case.shape.kernel_size)
        _check_device(self.device)
        _check_log(self.compiler_log)
        libraries.native()


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; use cpu, cuda or a GPU by its number such as cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: the layer is measured on cpu and cuda only; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch sees no CUDA GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0; use --device cuda")


def _check_log(path: Path) -> None:
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"--compiler-log {path}: cannot be written ({error.strerror}); give another file") from None


def baselines_of(names: Sequence[str]) -> tuple[str, ...]:
    """The baselines that :data:`SHORT_NAMES` stand for; "none" stands for nothing.

    Raises:
        ConfigError: another name.
    """
    short = dict(zip(SHORT_NAMES, BASELINES, strict=True))
    for name in names:
        if name not in (*short, "none"):
            raise ConfigError(f"baseline {name!r} is not known; choose among {', '.join(short)}, or none")
    return tuple(short[name] for name in names if name != "none")


def modes_of(text: str) -> tuple[bool, ...]:
    """Deterministic modes: "on", "off" or "both".

    Raises:
        ConfigError: another word.
    """
    modes = {"off": (False,), "on": (True,), "both": (False, True)}
    if text not in modes:
        raise ConfigError(f"deterministic {text!r}: choose on, off or both")
    return modes[text]


def layer_study(scope: Scope, say: Callable[[str], None], keep: Callable[[Study], None] = lambda study: None) -> Study:
    """Measure all that the scope asks for; what is found so far is said case by case, and given to ``keep`` line by line, so
    that an interruption loses only the measurement that runs.
    """
    started = time.perf_counter()
    device = torch.device(scope.device)
    before = torch.get_num_threads()
    torch.set_num_threads(scope.threads)
    try:
        with working_on(device):
            clock = Clock(device, repeats=scope.repeats, seconds=scope.seconds, cold=scope.cold)
            rates = clock.matrix_rate(DTYPES[scope.dtype]) / 1e12, clock.copy_rate() / 1e9
            study = Study(_machine(scope, device), *rates, {}, [])
            say(f"{study.machine['device']}: matrix product {rates[0]:.3g} TFLOP/s, copy {rates[1]:,.0f} GB/s")
            for case in scope.cases:
                late = time.perf_counter() - started > scope.limit
                blank = [Line(str(case), "", OURS, problem="not measured: time limit")]
                first, lines = len(study.lines), []
                for line in blank if late else _of_case(case, scope, clock, study, started):
                    lines.append(line)
                    study.lines[first:] = with_ratios(lines)
                    keep(study)
                done = sum(line.timing is not None for line in lines)
                say(f"{case}: {done} measurements, {time.perf_counter() - started:.0f} s so far")
                clock.clean()
    finally:
        torch.set_num_threads(before)
    return study


def _machine(scope: Scope, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    processor = f"{platform.processor() or platform.machine()}, {scope.threads} threads"
    name = torch.cuda.get_device_name(device) if gpu else processor
    options = {name: getattr(scope, name) for name in ("dtype", "padding", "repeats", "cold", "threads", "training_steps")}
    return {"device": name, "torch": torch.__version__, **options}


def _of_case(case: Case, scope: Scope, clock: Clock, study: Study, started: float) -> Iterator[Line]:
    dtype, inputs = DTYPES[scope.dtype], None
    try:
        with quiet_compiler(scope.compiler_log):  # kernels may be built at their first use
            values = gate_values(case, clock.device, steps=scope.training_steps, padding=scope.padding, dtype=dtype)
            inputs = make_inputs(case.shape, values, dtype, scope.padding)
            study.routing[str(case)] = _routing_figures(inputs)
    except (RuntimeError, MemoryError, SmoeError) as error:
        yield Line(str(case), "", OURS, problem=first_line(error))
    if inputs is None:
        return
    ways: list[tuple[str, Callable[[str, Inputs], Call | None], bool, Sequence[str]]] = [
        (OURS_DETERMINISTIC if mode else OURS, ours, mode, (*scope.parts, *(() if number else ("select", "plan"))))
        for number, mode in enumerate(scope.modes)
    ]
    ways += [(name, BASELINES[name], False, scope.parts) for name in scope.baselines]
    for name, way, mode, parts in ways:
        for part in parts:
            blank = Line(str(case), part, name)
            if time.perf_counter() - started > scope.limit:
                yield replace(blank, problem="not measured: time limit")
                continue
            with deterministic(mode), quiet_compiler(scope.compiler_log):
                line = attempt(blank, partial(way, part, inputs), clock)
            if line is not None:
                yield with_rates(line, case, dtype.itemsize, study.matrix_tflops)


def _routing_figures(inputs: Inputs) -> dict[str, float]:
    """What the plan says; nothing on a GPU without compiled kernels, where there is no plan."""
    if inputs.x.is_cuda and not library.available(inputs.x.device):
        return {}
    figures = plan_statistics(plan_of(inputs))
    experts = float(figures.columns[0])
    tiled = {"tiled": float(runs_tiles(inputs))} if inputs.x.is_cuda else {}
    return {
        **tiled,
        "experts_of_a_tile": experts,
        "columns_of_a_tile": inputs.shape.filters * experts,
        "used": float(figures.useful),
    }


def attempt(blank: Line, make: Callable[[], Call | None], clock: Clock) -> Line | None:
    """The line with its time and peak memory, or with what went wrong; None where the way has no such part."""
    clock.clean()
    before = clock.held_bytes()
    problem = None
    try:
        call = make()
        if call is None:
            return None
        call()
        own = clock.held_bytes() - before  # of the first call too, which makes the choice and plan that others use
        peak = clock.peak_bytes(call)
        timing = clock.measure(call)
    except (RuntimeError, MemoryError, SmoeError) as error:
        problem = first_line(error)
    if problem is not None:  # outside, where the failed call's tensors are no longer held by the traceback
        clock.clean()
        return replace(blank, problem=problem)
    return replace(blank, timing=timing, peak_mb=None if peak is None else (own + peak) / 1e6)
