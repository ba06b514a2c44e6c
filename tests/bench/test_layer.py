"""The benchmark of the layer: its cases, clocks and tables, and what its figures are made of."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from smoe_hpc.bench.layer import study as study_module
from smoe_hpc.bench.layer.baselines import Call, Inputs, quiet_compiler
from smoe_hpc.bench.layer.case import Case, Shape
from smoe_hpc.bench.layer.lines import OURS, OURS_DETERMINISTIC, Line, Study
from smoe_hpc.bench.layer.ours import deterministic, make_inputs, plan_of, runs_tiles
from smoe_hpc.bench.layer.profile import profile
from smoe_hpc.bench.layer.routing import gate_values
from smoe_hpc.bench.layer.study import BASELINES, Scope, attempt, layer_study
from smoe_hpc.bench.layer.tables import problems, tables
from smoe_hpc.bench.layer.timing import Clock, Timing, first_line
from smoe_hpc.errors import ConfigError

CPU = torch.device("cpu")
TINY = Shape(batch=2, channels=3, grid=(6, 8), num_experts=5, selected=2, filters=2)
EAGER = ("conv + gather", "channels last", "published", "plain convolution")
QUICK = {"device": "cpu", "dtype": "float32", "repeats": 5, "seconds": 0.0, "threads": 1, "training_steps": 2}


# -- the study -------------------------------------------------------------------------------------------------------


def test_the_study_measures_every_way_and_part():
    said: list[str] = []
    scope = Scope((Case(TINY, "smooth"), Case(TINY, "learned")), baselines=EAGER, **QUICK)
    kept: list[int] = []
    study = layer_study(scope, said.append, lambda so_far: kept.append(len(so_far.lines)))
    assert kept[-1] == len(study.lines)
    assert len(said) == 3
    of_case = [("forward", 6), ("backward", 6), ("step", 3), ("select", 1)]
    lines = [line for line in study.lines if line.case == "B2 C3 6x8 N5 K2 F2 learned"]
    assert {part: sum(line.part == part for line in lines) for part, _ in of_case} == dict(of_case)
    assert {line.way for line in lines} == {OURS, OURS_DETERMINISTIC, *EAGER}
    for line in study.lines:
        assert line.problem is None
        assert line.timing is not None
        assert line.timing.graph is line.timing.host is line.peak_mb is None
    by = {(line.way, line.part): line for line in lines}
    one = by[OURS, "backward"]
    assert one.timing is not None
    assert one.useful_tflops == pytest.approx(TINY.useful_flop("backward") / one.timing.device / 1e9)
    assert one.of_rate == pytest.approx(one.useful_tflops / study.matrix_tflops)
    dense, step = by["conv + gather", "backward"].timing, by[OURS, "step"]
    assert dense is not None
    assert step.timing is not None
    assert one.times["dense"] == pytest.approx(dense.device / one.timing.device)
    assert step.times["dense"] == pytest.approx(dense.device / step.timing.device)
    assert set(step.times) == {"dense", "last", "published", "plain"}
    x, y, weight = 2 * 48 * 3 * 4, 2 * 48 * 4 * 4, 2 * 2 * 3 * 9 * 4
    assert by["plain convolution", "forward"].least_mb == pytest.approx((x + y + weight) / 1e6)
    assert by["conv + gather", "forward"].least_mb == pytest.approx((x + y + 5 / 2 * weight + 48 * 2 * 4) / 1e6)
    assert study.routing[lines[0].case]["columns_of_a_tile"] == 2 * study.routing[lines[0].case]["experts_of_a_tile"]
    json.dumps(study.as_dict())
    made = tables(study)
    assert [len(rows) for _, _, rows in made] == [16, 16, 4]
    assert all(len(row) == len(columns) for _, columns, rows in made for row in rows)


def test_whoever_ends_it_loses_only_the_measurement_that_runs(monkeypatch: pytest.MonkeyPatch):
    kept: list[dict] = []
    calls = 0

    def last_baseline(part: str, inputs: Inputs) -> Call:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return lambda: None

    monkeypatch.setitem(study_module.BASELINES, "plain convolution", last_baseline)
    scope = Scope((Case(TINY),), ("forward", "backward"), ("published", "plain convolution"), (False,), **QUICK)
    with pytest.raises(KeyboardInterrupt):
        layer_study(scope, lambda line: None, lambda study: kept.append(study.as_dict()))
    assert [len(so_far["lines"]) for so_far in kept] == [1, 2, 3, 4, 5, 6]
    assert [set(line["times"]) for line in kept[1]["lines"]] == [set(), set()]
    ours, *_, plain = kept[-1]["lines"]
    assert (plain["way"], plain["part"]) == ("plain convolution", "forward")
    assert set(ours["times"]) == {"published", "plain"}


def test_what_fails_gives_a_line():
    clock = Clock(CPU, repeats=5, seconds=0.0)
    blank = Line("case", "forward", "way")
    too_large = attempt(blank, lambda: lambda: torch.empty(1 << 60), clock)
    assert too_large == replace(blank, problem="out of memory")
    mismatched = attempt(blank, lambda: lambda: torch.ones(2) @ torch.ones(3), clock)
    assert mismatched is not None
    assert "inconsistent tensor size" in str(mismatched.problem)
    assert "\n" not in str(mismatched.problem)
    assert attempt(blank, lambda: None, clock) is None
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(RuntimeError("")) == "RuntimeError"
    study = Study({}, 1.0, 1.0, {}, [too_large, replace(blank, part="step", problem="one")])
    step = "forward + backward + routing loss + damping"
    assert problems(study) == ["case, way, forward: out of memory", f"case, way, {step}: one"]
    assert [row[2] for row in tables(study)[0][2]] == ["memory", "failed"]


def test_peak_memory_counts_what_the_first_call_leaves():
    class Counting(Clock):
        """Counts the bytes of the tensors in a list, since torch counts none on a CPU."""

        kept: ClassVar[list[torch.Tensor]] = []

        def held_bytes(self) -> int:
            return sum(tensor.nbytes for tensor in self.kept)

        def peak_bytes(self, call: Call) -> int | None:
            before = self.held_bytes()
            return call().nbytes + self.held_bytes() - before

    def make() -> Call:
        Counting.kept.append(torch.zeros(1 << 20))  # as the weights

        def call() -> torch.Tensor:
            if len(Counting.kept) == 1:
                Counting.kept.append(torch.zeros(2 << 20))  # as the plan
            return torch.zeros(4 << 20)

        return call

    line = attempt(Line("case", "forward", OURS), make, Counting(CPU, repeats=5, seconds=0.0))
    assert line is not None
    assert line.peak_mb == pytest.approx(7 * 4 * (1 << 20) / 1e6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_figures_are_held_against_the_rate_of_their_type(dtype: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.dtype] = []

    class Asked(Clock):
        def matrix_rate(self, dtype: torch.dtype) -> float:
            asked.append(dtype)
            return super().matrix_rate(dtype)

    monkeypatch.setattr(study_module, "Clock", Asked)
    study = layer_study(Scope((), **{**QUICK, "dtype": dtype}), lambda line: None)
    assert asked == [study_module.DTYPES[dtype]]
    assert study.matrix_tflops > 0


def test_the_matrix_rate_leaves_the_precision_as_it_was():
    seen: list[str] = []
    products = torch.backends.cuda.matmul

    class Looks(Clock):
        def measure(self, call: Call, *, graph: bool = True) -> Timing:
            seen.append(products.fp32_precision)
            return super().measure(call, graph=graph)

    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        Looks(CPU, repeats=5, seconds=0.0).matrix_rate(torch.float32)
        assert (seen, products.fp32_precision) == (["ieee"], "tf32")
    finally:
        products.fp32_precision = before


def test_nothing_starts_after_the_limit():
    study = layer_study(Scope((Case(TINY),), baselines=EAGER, limit=0.0, **QUICK), lambda line: None)
    assert [line.problem for line in study.lines] == ["not measured: time limit"]
    assert problems(study) == [f"{TINY} smooth, ours, all: not measured: time limit"]


def test_what_the_compiler_says_goes_to_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    log = tmp_path / "log"
    for text in (b"first\n", b"second\n"):
        with quiet_compiler(log):
            os.write(2, text)
            os.system("echo child")
    print("heard", file=sys.stderr, flush=True)
    assert log.read_bytes() == b"first\nchild\nsecond\nchild\n"
    assert capfd.readouterr() == ("", "heard\n")


def test_the_deterministic_mode_is_left_as_it_was():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ("sideways",)}, "part 'sideways' is not known"),
        ({"baselines": ("conv",)}, "baseline 'conv' is not known"),
        ({"dtype": "int8"}, "type 'int8' is not known"),
        ({"padding": "ones"}, "padding 'ones' is not known; choose among zeros"),
        ({"padding": "sphere", "cases": (Case(replace(TINY, grid=(6, 7))),)}, "grid 6x7 needs an even number of columns"),
        ({"device": "gpu"}, "device 'gpu' is not known"),
        ({"device": "meta"}, "device 'meta': .* on cpu and cuda only"),
        ({"device": "cuda:99"}, "device 'cuda:99': torch sees"),
        ({"compiler_log": Path("/proc/none/log")}, "--compiler-log /proc/none/log: cannot be written"),
    ],
    ids=str,
)
def test_a_scope_that_cannot_be_is_refused(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Scope(**{**QUICK, "cases": (Case(TINY),), **wrong})


def test_the_compilers_log_is_in_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name below /tmp could be guessed, and be a link to any file of the user's."""
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "cache"))
    assert Scope((Case(TINY),), **QUICK).compiler_log == tmp_path / "cache" / "bench" / "compiler.log"
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be made .*; free space, or set SMOE_CACHE to another folder"):
        Scope((Case(TINY),), **QUICK)


def test_a_switch_that_is_not_known_is_found_out_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMOE_KERNELS", "fast")
    with pytest.raises(ConfigError, match="native or torch"):
        Scope((Case(TINY),), **QUICK)


# -- on a GPU --------------------------------------------------------------------------------------------------------

GPU_CASE = Case(Shape(batch=8, channels=64, grid=(16, 32), num_experts=96, selected=64), "smooth")


@pytest.mark.gpu
def test_on_a_gpu_every_clock_runs(tmp_path: Path):
    scope = Scope((GPU_CASE,), repeats=8, seconds=0.02, compiler_log=tmp_path / "log")
    study = layer_study(scope, lambda line: None)
    assert problems(study) == []
    assert {line.way for line in study.lines} == {OURS, OURS_DETERMINISTIC, *BASELINES}
    for line in study.lines:
        assert line.timing is not None
        assert line.timing.no_graph is None, line
        assert line.timing.graph is not None
        assert line.timing.host is not None
        assert line.peak_mb is not None
    assert {line.part for line in study.lines if line.way == OURS} == {"forward", "backward", "step", "select", "plan"}


@pytest.mark.gpu
def test_on_a_gpu_a_baseline_that_is_too_large_leaves_the_rest_alone():
    free = torch.cuda.mem_get_info()[0]
    clock, blank = Clock(torch.device("cuda"), repeats=5, seconds=0.0), Line("case", "forward", "way")
    line = attempt(blank, lambda: lambda: torch.empty(2 * free, dtype=torch.uint8, device="cuda"), clock)
    assert line == replace(blank, problem="out of memory")
    again = attempt(blank, lambda: lambda: torch.ones(1 << 20, device="cuda"), clock)
    assert again is not None
    assert again.peak_mb == pytest.approx(4.19, abs=0.1)


@pytest.mark.gpu
def test_on_a_gpu_the_memory_of_the_plan_counts():
    study = layer_study(Scope((GPU_CASE,), ("forward",), (), (False,), repeats=5, seconds=0.0), lambda line: None)
    (line,) = [line for line in study.lines if line.part == "forward"]
    values = gate_values(GPU_CASE, torch.device("cuda"), dtype=torch.bfloat16)
    inputs = make_inputs(GPU_CASE.shape, values, torch.bfloat16, "zeros")
    assert line.peak_mb is not None
    assert runs_tiles(inputs)
    plan = sum(t.nbytes for t in plan_of(inputs).tensors())
    x, y, weight = inputs.x.nbytes, inputs.grad.nbytes, 4 * 96 * 64 * 9
    assert line.peak_mb > (x + y + weight + plan) / 1e6


@pytest.mark.multigpu
def test_the_second_gpu_is_measured_itself():
    with torch.cuda.device(0):
        study = layer_study(Scope((GPU_CASE,), ("forward",), (), (False,), "cuda:1", repeats=5, seconds=0.0), lambda line: None)
        assert torch.cuda.current_device() == 0
    assert problems(study) == []
    assert all(line.peak_mb for line in study.lines if line.part == "forward")


@pytest.mark.gpu
def test_on_a_gpu_the_profile_names_each_part():
    scope = Scope((GPU_CASE,), baselines=("plain convolution",), modes=(False,))
    parts = ["forward, ours", "backward, ours", "step, ours", "select, ours", "plan, ours"]
    assert profile(scope, lambda line: None) == [*parts, "forward, plain convolution", "backward, plain convolution"]
