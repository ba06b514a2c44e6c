"""A rank that cannot speak: the others end, and say which it was, in which step and at which collective."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import start_two_ranks

SECONDS = 8  # more than a loaded machine takes between two collectives


@pytest.mark.parametrize(
    ("rank", "sent", "said"),
    [
        (1, "SIGSTOP", f"rank 1 did not come to all_reduce (gradients) of step 7 within {SECONDS} s and gives no sign of life"),
        (0, "SIGKILL", "rank 0 ended without a word (killed, perhaps for want of memory?); rank 1 waited in all_reduce"),
    ],
)
def test_the_others_end_and_name_it(tmp_path: Path, rank: int, sent: str, said: str) -> None:
    processes = start_two_ranks("failing_rank", tmp_path / "run", rank, "signal", sent, SMOE_TIMEOUT=str(SECONDS))
    other = processes[1 - rank]
    try:
        words = other.communicate(timeout=240)[1]
        assert processes[rank].poll() == (None if sent == "SIGSTOP" else -9)
    finally:
        processes[rank].kill()
        processes[rank].communicate()
    assert other.returncode == 2, words
    assert words.splitlines()[-1].startswith(f"error: {said}"), words
    assert "Traceback" not in words
    assert "its own message says why" not in words
