"""The command that measures the layer: its tables and figures, what it refuses, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from smoe_hpc.bench.layer import study
from smoe_hpc.bench.layer.lines import OURS, Line, Study
from smoe_hpc.bench.layer.timing import Timing
from smoe_hpc.cli import app

MEASURED = Line("a case", "forward", OURS, Timing(1.25))
FAILED = Line("a case", "forward", OURS, problem="out of memory")
RIVAL = Line("a case", "forward", "plain convolution", Timing(1.0))


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "layer", "--device", "cpu", *arguments], prog_name="smoe-hpc")


def test_the_command_prints_tables_and_writes_figures(tmp_path: Path):
    file = tmp_path / "figures.json"
    options = ["--case", "B2 C3 6x8 N5 K2 F2", "--parts", "forward,backward", "--baselines", "dense,plain", "--threads", "1"]
    done = command(*options, "--deterministic", "off", "--repeats", "5", "--seconds", "0", "--json", str(file))
    assert done.exit_code == 0, done.output
    assert "B2 C3 6x8 N5 K2 F2 smooth: a tile needs" in done.output
    figures = json.loads(file.read_text())
    assert {(line["way"], line["part"]) for line in figures["lines"]} == {
        ("ours", "select"),
        *((way, part) for way in ("ours", "conv + gather", "plain convolution") for part in ("forward", "backward")),
    }
    assert figures["machine"]["dtype"] == "float32"
    assert figures["matrix_tflops"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--baselines", "torch"],
        ["--deterministic", "maybe"],
        ["--selection", "all"],
        ["--case", "4x4"],
        ["--profile"],
        ["--padding", "ones"],
        ["--compiler-log", "/proc/none/log"],
        ["--device", "gpu"],
        ["--device", "cpu:x"],
    ],
    ids=" ".join,
)
def test_the_command_refuses_in_one_line(options: list[str]):
    done = command(*options)
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1


def study_that_finds(*lines: Line, then: BaseException | None = None) -> Callable[..., Study]:
    """A study without measurements: these lines, and then its end."""

    def run(scope: study.Scope, say: Callable[[str], None], keep: Callable[[Study], None]) -> Study:
        study = Study({}, 1.0, 1.0, {}, [])
        for line in lines:
            study.lines.append(line)
            keep(study)
        if then is not None:
            raise then
        return study

    return run


def test_ctrl_c_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(study, "layer_study", study_that_finds(MEASURED, then=KeyboardInterrupt()))
    done = command("--json", str(tmp_path / "figures.json"))
    assert done.exit_code == 130
    assert "1.250" in done.output
    assert [line["timing"]["events"] for line in json.loads((tmp_path / "figures.json").read_text())["lines"]] == [1.25]


def test_the_status_says_whether_anything_of_ours_has_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "layer_study", study_that_finds(MEASURED, FAILED))
    assert command().exit_code == 0
    monkeypatch.setattr(study, "layer_study", study_that_finds(FAILED, RIVAL))
    done = command()
    assert done.exit_code == 2
    assert "a case, ours, forward: out of memory" in done.output
    assert "error: none of our kernels could be measured" in done.output
