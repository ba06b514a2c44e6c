"""Tables, lines and progress."""

import pytest

from smoe_hpc.cli.output import progress, show_table


def test_a_long_table_has_no_frame(capsys: pytest.CaptureFixture[str]):
    show_table("t\x1b", ["name", "n"], [[f"r{number}", str(number)] for number in range(101)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["t\\x1b", "name    n", "r0      0"]
    assert lines[-1] == "r100  100"


def test_a_table_that_is_too_wide_for_a_pipe_keeps_its_figures(capsys: pytest.CaptureFixture[str]):
    show_table("t", ["name", "state", "n"], [["r", "x" * 170, "0.765432109"]])
    assert "0.765432109" in capsys.readouterr().out


def test_progress_in_a_pipe_is_a_line_at_each_quarter(capsys: pytest.CaptureFixture[str]):
    with progress("work\x1b") as report:
        for done in range(101):
            report(done, 100)
    assert capsys.readouterr().err.splitlines() == [f"work\\x1b: {done}/100" for done in (25, 50, 75, 100)]


def test_progress_of_each_thing_names_it(capsys: pytest.CaptureFixture[str]):
    with progress("kernels", each=True) as report:
        report(0, 2, "")
        report(1, 2, "a.cu")
        report(2, 2, "b\n.cu")
    assert capsys.readouterr().err.splitlines() == ["kernels: 1/2 a.cu (0 s)", "kernels: 2/2 b\\n.cu (0 s)"]
