"""Where runs stand: what a folder says, and one that says nothing sensible beside others."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from smoe_hpc.runs import Standing, standing, standings
from smoe_hpc.runs.reading import newest_events

STEP = {"event": "step", "step": 8, "loss": 1.0}
VALIDATION = {
    "event": "validation",
    "step": 7,
    "split": "validation",
    "scores": {"all": {"loss": 2.0, "rmse": 1.5, "within_1pct": 80.0}},
    "best": {"score": "within_1pct", "value": 90.0, "step": 5},
}


def nobody(jobs: Sequence[str]) -> dict[str, str]:
    return {}


def make_run(root: Path, name: str, *events: Any) -> Path:
    run = root / name
    run.mkdir()
    (run / "lock").write_text("process 1 on a\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def test_newest_and_best_score(tmp_path: Path) -> None:
    make_run(tmp_path, "new", VALIDATION, STEP)
    make_run(tmp_path, "old", {name: value for name, value in VALIDATION.items() if name != "best"}, STEP)
    make_run(tmp_path, "young", STEP)
    new, old, young = standings(tmp_path, nobody)
    assert new == Standing("new", "interrupted", 8, ("validation", "within_1pct", 80.0), ("validation", "within_1pct", 90.0), 5)
    assert (old.last, old.best) == (("validation", "rmse", 1.5), None)
    assert (young.step, young.last, young.best) == (8, None, None)


def test_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "long", VALIDATION)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({**STEP, "step": step, "pad": "x" * 100}) + "\n" for step in range(9, 3000))
        file.write('{"event": "ste')
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append(size) or pread(file, size, at))
    assert next(newest_events(str(run / "metrics.jsonl")))["step"] == 2999
    assert read == [1 << 13]
    found = standing(run, nobody)
    assert found is not None
    assert (found.step, found.best) == (2999, ("validation", "within_1pct", 90.0)), "beyond one block"


def test_lines_are_whole_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = [{"step": step, "text": "é" * (step % 700)} for step in range(400)]
    path.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events))
    assert list(newest_events(str(path))) == events[::-1]


HOSTILE = {
    "no_objects": b'1\n"text"\n[]\nnull\n',
    "no_text": b"\xff\xfe\n\x80\n",
    "deep": b"[" * 200_000 + b"\n",
    "one_endless_line": b"x" * (3 << 20),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_holds_nothing_of_ours(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, "bad", STEP)
    (tmp_path / "bad" / "metrics.jsonl").write_bytes(HOSTILE[name])
    make_run(tmp_path, "good", STEP)
    bad, good = standings(tmp_path, nobody)
    assert bad == Standing("bad", "cannot be read (metrics.jsonl: its end holds no lines of a run)")
    assert good.step == 8


def test_lines_that_are_not_ours_among_others_are_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", VALIDATION, STEP)
    odd = [[1], 7, {"step": "nine"}, {"step": True}, {"event": 3}, {"step": None}]
    with (run / "metrics.jsonl").open("ab") as file:
        file.writelines(json.dumps(value).encode() + b"\n" for value in odd)
        file.write(b"\xff\xff{}\n")
    found = standing(run, nobody)
    assert found is not None
    assert (found.step, found.best) == (8, ("validation", "within_1pct", 90.0))


@pytest.mark.parametrize(
    "wrong", [{"scores": 5}, {"scores": {"all": [1]}}, {"scores": {"all": {"rmse": "x"}}}, {"best": [1]}, {"split": {"a": 1}}]
)
def test_a_validation_of_another_shape(tmp_path: Path, wrong: dict[str, Any]) -> None:
    make_run(tmp_path, "run", {**VALIDATION, **wrong}, STEP)
    (found,) = standings(tmp_path, nobody)
    assert (found.state, found.step) == ("interrupted", 8)


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("lock", "metrics.jsonl"):
        for kind in ("pipe", "folder", "loop"):
            path = make_run(tmp_path, f"{kind} {name}", STEP) / name
            path.unlink()
            {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": lambda p: p.symlink_to(p)}[kind](path)
    (make_run(tmp_path, "jobs", STEP) / "jobs").touch()
    make_run(tmp_path, "good", STEP)
    found = {run.run: run.state for run in standings(tmp_path, nobody)}
    assert found.pop("good") == "interrupted"
    assert found == {
        "pipe lock": "cannot be read (lock is a FIFO, not a regular file)",
        "folder lock": "cannot be read (lock is a directory, not a regular file)",
        "loop lock": "cannot be read (lock: Too many levels of symbolic links)",
        "pipe metrics.jsonl": "cannot be read (metrics.jsonl is a FIFO, not a regular file)",
        "folder metrics.jsonl": "cannot be read (metrics.jsonl is a directory, not a regular file)",
        "loop metrics.jsonl": "cannot be read (metrics.jsonl: Too many levels of symbolic links)",
        "jobs": "cannot be read (jobs: Not a directory)",
    }


def test_what_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "closed", STEP)
    opened = os.open

    def refuse(path: Any, *how: Any) -> int:  # for root, who may read everything
        if str(path).endswith("metrics.jsonl"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *how)

    monkeypatch.setattr(os, "open", refuse)
    found = standing(run, nobody)
    assert found == Standing("closed", "cannot be read (metrics.jsonl: Permission denied)")


def test_slurm_is_asked_once_for_all(tmp_path: Path) -> None:
    for name, job in (("a", "12"), ("b", "13_4"), ("c", "14")):
        (make_run(tmp_path, name, STEP) / "lock").write_text(f"process 1 on h of Slurm job {job}\n")
    asked: list[list[str]] = []

    def states(jobs: list[str]) -> dict[str, str]:
        asked.append(list(jobs))
        return {"12": "PENDING", "13_4": "RUNNING"}

    found = [(run.state, run.job, run.job_state) for run in standings(tmp_path, states)]
    assert found == [("queued", "12", "PENDING"), ("starting", "13_4", "RUNNING"), ("interrupted", "14", None)]
    assert asked == [["12", "13_4", "14"]]


def test_folders_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert standings(tmp_path, nobody) == []
    assert standing(tmp_path / "folder", nobody) is None
