"""The benchmark of status: what it measures agrees."""

import json
from pathlib import Path

from typer.testing import CliRunner

from smoe_hpc.bench.status import make_runs, parse_whole
from smoe_hpc.cli import app
from smoe_hpc.runs import standings


def test_the_end_says_what_the_whole_does(tmp_path: Path) -> None:
    make_runs(tmp_path, runs=3, steps=120)
    found = standings(tmp_path, lambda jobs: {})
    assert [run.step for run in found] == [row["step"] for row in parse_whole(tmp_path)] == [120] * 3
    assert {run.best for run in found} == {("validation", "rmse", 1.2)}


def test_the_command(tmp_path: Path) -> None:
    arguments = ["bench", "status", str(tmp_path / "runs"), "--runs", "2", "--steps", "50", "--repeats", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "t.json")], prog_name="smoe-hpc")
    assert result.exit_code == 0, result.output
    assert [line["runs"] for line in json.loads((tmp_path / "t.json").read_text())] == [2, 2, 2]
