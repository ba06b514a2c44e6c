"""The study of the layer as tables for people: one for each case, and one over all."""

from __future__ import annotations

from smoe_hpc.bench.layer.case import PART_NAMES
from smoe_hpc.bench.layer.lines import OURS, OURS_DETERMINISTIC, Line, Study

Table = tuple[str, tuple[str, ...], list[list[str]]]
_COLUMNS = (
    "way", "part", "ms", "ms eager", "ms host", "TFLOP/s", "of rate", "MB least", "MB peak",
    "dense/", "last/", "publ./", "plain/",
)  # fmt: skip
_SUMMARY = (
    "case", "mode", "tile", "select", "plan", "fwd rate dense/ last/", "+bwd rate dense/ last/", "step rate publ./ plain/",
    "mem.",
)  # fmt: skip
_RATIOS = {"forward": ("dense", "last"), "backward": ("dense", "last"), "step": ("published", "plain")}
_SHORT = {"forward": "forward", "backward": "+ backward", "step": "+ routing loss", "select": "select", "plan": "plan"}


def tables(study: Study) -> list[Table]:
    """(title, columns, cells) for each case, then over all cases.

    Columns: "ms" is the device's time (replays of a CUDA graph; where there is none, marked *, events around an eager
    call), "ms eager" that of events around eager calls, "ms host" the time until an eager call returns; "of rate" the share
    of the matrix rate; "dense/", "last/", "publ./" and "plain/" say how often this way's time goes into that of the faster of
    eager and compiled convolution + gather along dimension 1, along the last one, the published layer, and a plain
    convolution.
    """
    made: list[Table] = []
    for case in dict.fromkeys(line.case for line in study.lines):
        lines = [line for line in study.lines if line.case == case]
        figures = study.routing.get(case)
        about = ""
        if figures:
            about = f": a tile needs {figures['experts_of_a_tile']:.0f} experts, a pixel {100 * figures['used']:.0f} % of them"
            about += "" if figures.get("tiled", 1.0) else "; ours runs without tiles"
        made.append((f"{case}{about}", _COLUMNS, [_cells(line) for line in lines]))
    return [*made, summary(study)]


def summary(study: Study) -> Table:
    """A row for each case and mode of our kernels ("det.": deterministic). Times in ms, "step" with routing loss and
    damping; "mem.": the step's memory over that of a plain convolution's two passes.
    """
    rows = []
    for case in dict.fromkeys(line.case for line in study.lines):
        found = {(line.way, line.part): line for line in study.lines if line.case == case}
        tile = study.routing.get(case, {}).get("experts_of_a_tile")
        for way, mode in ((OURS, "fast"), (OURS_DETERMINISTIC, "det.")):
            if not any(line.way == way for line in found.values()):
                continue
            row = [case, mode, "-" if tile is None else f"{tile:.0f}"]
            row += [_time(found.get((OURS, part), found.get((way, part)))) for part in ("select", "plan")]
            for part, others in _RATIOS.items():
                line = found.get((way, part))
                row.append(" ".join([_time(line), _share(line, 0), *(_ratio(line, name) for name in others)]))
            rows.append([*row, _memory(found.get((way, "step")), found.get(("plain convolution", "backward")))])
    title = f"matrix product {study.matrix_tflops:.3g} TFLOP/s, copy {study.copy_gb:,.0f} GB/s"
    return (f"ours, all cases; {title}", _SUMMARY, rows)


def problems(study: Study) -> list[str]:
    """A line for each measurement that failed, with the reason."""
    failed = [line for line in study.lines if line.problem is not None]
    return [f"{line.case}, {line.way}, {PART_NAMES.get(line.part, 'all')}: {line.problem}" for line in failed]


def _cells(line: Line) -> list[str]:
    timing = line.timing
    if timing is None:
        return [line.way, _SHORT.get(line.part, "all"), _time(line), *["-"] * (len(_COLUMNS) - 3)]
    return [
        line.way,
        _SHORT[line.part],
        _time(line),
        f"{timing.events:.3f}",
        "-" if timing.host is None else f"{timing.host:.3f}",
        "-" if line.useful_tflops is None else f"{line.useful_tflops:.3g}",
        _share(line),
        "-" if line.least_mb is None else f"{line.least_mb:.1f}",
        "-" if line.peak_mb is None else f"{line.peak_mb:.1f}",
        *(_ratio(line, name) for name in ("dense", "last", "published", "plain")),
    ]


def _time(line: Line | None) -> str:
    if line is None:
        return "-"
    if line.timing is None:
        return "memory" if line.problem == "out of memory" else "failed"
    return f"{line.timing.device:.3f}{'*' if line.timing.graph is None and line.timing.no_graph else ''}"


def _memory(line: Line | None, other: Line | None) -> str:
    peaks = [None if one is None else one.peak_mb for one in (line, other)]
    return "-" if peaks[0] is None or not peaks[1] else f"{peaks[0] / peaks[1]:.2f}"


def _share(line: Line | None, digits: int = 1) -> str:
    return "-" if line is None or line.of_rate is None else f"{100 * line.of_rate:.{digits}f}%"


def _ratio(line: Line | None, name: str) -> str:
    return "-" if line is None or name not in line.times else f"{line.times[name]:.3g}"
