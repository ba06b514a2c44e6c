"""A time budget is kept by a process that starts another."""

import sys
from pathlib import Path

import pytest

from smoe_hpc.jobs import budget


def test_the_budget_is_kept_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A process that answers SIGTERM with 75 leaves with it; one that ignores it is killed."""
    script = tmp_path / "child.py"
    monkeypatch.setattr(budget, "_GRACE", 1.0)
    monkeypatch.setattr(budget, "_COMMAND", [sys.executable, str(script)])
    waits = "import signal, sys, time\nsignal.signal(signal.SIGTERM, {})\ntime.sleep(60)\n"
    script.write_text(waits.format("lambda *_: sys.exit(75)"))
    assert budget.run_verb([], 3.0) == 75
    script.write_text(waits.format("signal.SIG_IGN"))
    assert budget.run_verb([], 3.0) == -9
    script.write_text("import sys; sys.exit(3)")
    assert budget.run_verb([], 60.0) == 3
