"""Measurements of the benchmark of the layer, and what is worked out from them: work, bytes and ratios."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from smoe_hpc.bench.layer.case import PARTS, Case
from smoe_hpc.bench.layer.timing import Timing

OURS, OURS_DETERMINISTIC = "ours", "ours, deterministic"
DENSE = ("conv + gather", "conv + gather, compiled")
LAST = ("channels last", "channels last, compiled")


@dataclass(frozen=True)
class Line:
    """One measurement.

    Args:
        case: sizes and routing, as text.
        part: of the work.
        way: ours, or a baseline.
        timing: None where it failed.
        problem: why it failed, in a line.
        useful_tflops: TFLOP/s counting only what the selected experts need.
        of_rate: the same as a share of the matrix rate; above 1 where a library rounds float32 to TF32, which that rate
            does not.
        least_mb: MB that must move at least.
        peak_mb: MB held at the fullest, input, gate, weights, choice and plan included; None on a CPU.
        times: how often its time goes into that of others: "dense" (the faster of eager and compiled convolution + gather
            along dimension 1), "last" (the same with the gather along the last dimension), "published", "plain".
    """

    case: str
    part: str
    way: str
    timing: Timing | None = None
    problem: str | None = None
    useful_tflops: float | None = None
    of_rate: float | None = None
    least_mb: float | None = None
    peak_mb: float | None = None
    times: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """All that was measured.

    Args:
        machine: device, torch, and the options that change figures.
        matrix_tflops: the device's matrix rate for the scope's type; see :meth:`Clock.matrix_rate`.
        copy_gb: GB a second of a large copy.
        routing: for each case what its plan says: experts that a tile needs (mean), the share of them that a pixel uses; and
            whether ("tiled", on a GPU) the layer uses it, or the library's dense form.
        lines: the measurements.
    """

    machine: dict[str, Any]
    matrix_tflops: float
    copy_gb: float
    routing: dict[str, dict[str, float]]
    lines: list[Line]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def with_rates(line: Line, case: Case, element: int, matrix_tflops: float) -> Line:
    """The line with its useful work, least bytes and all memory; ``element``: bytes of a number of input and output."""
    if line.timing is None:
        return line
    shape = case.shape
    weight_element = 4 if line.way.startswith(OURS) else element
    plain_part = line.way == "plain convolution"
    counted = replace(shape, num_experts=shape.selected) if plain_part else shape
    least = counted.least_bytes(line.part, element, weight_element, indexed=not plain_part)
    peak = line.peak_mb
    if peak is not None and line.way != "published":  # which holds copies of its own
        shared = element * shape.batch * shape.pixels * (shape.channels + (line.part != "forward") * shape.out_channels)
        gate = 4 * shape.pixels * shape.num_experts if line.part in ("step", "select") else 0
        peak += (shared + gate) / 1e6 if line.part in PARTS else gate / 1e6
    flops = shape.useful_flop(line.part) / (line.timing.device * 1e-3) / 1e12
    line = replace(line, least_mb=least / 1e6 if least else None, peak_mb=peak)
    return replace(line, useful_tflops=flops, of_rate=flops / matrix_tflops) if flops else line


def with_ratios(lines: list[Line]) -> list[Line]:
    """Each line with how often its time goes into that of the baselines for the same part; for the whole step also into the
    forward and backward of those that have no routing loss.
    """
    times = {(line.way, line.part): line.timing.device for line in lines if line.timing is not None}

    def of(way: str, part: str) -> float | None:
        return times.get((way, part), times.get((way, "backward")) if part == "step" else None)

    made = []
    for line in lines:
        if line.timing is None:
            made.append(line)
            continue
        others = {"plain": of("plain convolution", line.part), "published": times.get(("published", line.part))}
        for name, ways in (("dense", DENSE), ("last", LAST)):
            others[name] = min((time for way in ways if (time := of(way, line.part)) is not None), default=None)
        own = line.timing.device
        made.append(replace(line, times={name: other / own for name, other in others.items() if other is not None}))
    return made
