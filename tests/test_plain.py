"""Nothing from outside reaches a terminal as more than text."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoe_hpc.cli import app
from smoe_hpc.cli.output import say, show_scores, show_table
from smoe_hpc.text import printable
from smoe_hpc.training.progress import Watch

EVIL = "a\x1b[31m\x9b2J\x07\rb\nerror: forged\u202e[bold]x[/bold]"
SHOWN = r"a\x1b[31m\x9b2J\x07\rb\nerror: forged\u202e[bold]x[/bold]"


def test_what_cannot_be_printed_is_written_out() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("Zürich, 2 °C, 東京") == "Zürich, 2 °C, 東京"
    assert printable("\ud800\u2028") == r"\ud800\u2028"


def test_lines_tables_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    show_table(EVIL, ["name", EVIL], [[EVIL, EVIL]])
    show_scores({"test": {EVIL: {"rmse": 1.0}}})
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 6, out
    assert out.startswith(SHOWN + "\n")
    assert "\x1b" not in out
    assert "\r" not in out


def test_progress_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        seen = io.StringIO()
        monkeypatch.setattr(seen, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", seen)
        monkeypatch.setenv("COLUMNS", "200")
        watch = Watch(EVIL, 10, 0, active=True)
        watch.say(EVIL)
        watch.close()
        assert f"{SHOWN}: {SHOWN}" in seen.getvalue()
        assert "forged\u202e" not in seen.getvalue()


def test_an_error_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["status", str(tmp_path / EVIL)], prog_name="smoe-hpc")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/{SHOWN} is no folder of runs; name one, e.g. smoe-hpc status runs\n"


def test_what_is_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = io.StringIO()
    last = logging.lastResort
    assert last is not None
    monkeypatch.setattr("smoe_hpc.runs.standings", lambda *_: last.emit(logging.makeLogRecord({"msg": EVIL})) or [])
    monkeypatch.setattr(type(last), "stream", property(lambda _: seen))
    CliRunner().invoke(app, ["status", str(tmp_path)], prog_name="smoe-hpc")
    assert seen.getvalue() == SHOWN + "\n"
    assert last.formatter is None


def test_names_of_runs_and_what_their_files_hold(tmp_path: Path) -> None:
    run = tmp_path / EVIL.replace("/", "")
    run.mkdir()
    (run / "lock").write_text(f"process 1 on h of Slurm job {EVIL}\n")
    event = {"event": "validation", "step": 1, "split": EVIL, "scores": {"all": {EVIL: 1.0}}}
    (run / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    result = CliRunner().invoke(app, ["status", str(tmp_path)], prog_name="smoe-hpc")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "\nerror" not in result.output
    assert r"\x1b[31m" in result.output
