"""Where runs stand: state, step, newest and best score, Slurm job; the folder of one, or all of a folder.

Only the end of metrics.jsonl is read, and Slurm is queried once for all runs. An unreadable run is listed as such, beside
the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smoe_hpc.runs import layout
from smoe_hpc.runs.lock import Holder, look
from smoe_hpc.runs.reading import Unreadable, newest_events, read_start

_WAITING = ("PENDING", "REQUEUED", "CONFIGURING")


@dataclass(frozen=True)
class Standing:
    """A run as its folder shows it.

    Attributes:
        run: name of the folder.
        state: "running", "queued", "starting" (its job runs, and has not come to training), "ended", "interrupted",
            "failed" (it ended before training began), "submitted" (as local processes that have written nothing
            yet), or "cannot be read (why)".
        step: newest optimiser step that was written down; None of none.
        last: split, name and value of the newest validation's score.
        best: the same of the best validation so far, by the score that picks the checkpoint.
        best_step: its step.
        job: its Slurm job.
        job_state: the job's state as Slurm words it; None where Slurm does not know it.
    """

    run: str
    state: str
    step: int | None = None
    last: tuple[str, str, float | None] | None = None
    best: tuple[str, str, float | None] | None = None
    best_step: int | None = None
    job: str | None = None
    job_state: str | None = None


@dataclass(frozen=True)
class _Found:
    """What the folder alone shows; the state depends on the job too."""

    standing: Standing
    held: bool | None = False
    begun: bool = False
    ended: bool = False
    failed: bool = False


def standings(root: Path, job_states: Callable[[list[str]], Mapping[str, str]]) -> list[Standing]:
    """All runs of a folder, by name; folders that hold no run are left out.

    Args:
        root: the folder of runs.
        job_states: {job: state} of those jobs that Slurm knows.
    """
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries)
    found = [one for name in names if (one := _look(os.path.join(root, name))) is not None]
    jobs = [one.standing.job for one in found if one.standing.job is not None]
    states = job_states(jobs) if jobs else {}
    return [_with_state(one, states) for one in found]


def standing(folder: Path, job_states: Callable[[list[str]], Mapping[str, str]]) -> Standing | None:
    """Where one run stands; None of a folder that holds none."""
    found = _look(str(folder))
    if found is None:
        return None
    job = found.standing.job
    return _with_state(found, job_states([job]) if job else {})


def _look(folder: str) -> _Found | None:
    name = os.path.basename(folder)
    try:
        holder = look(f"{folder}/{layout.LOCK}")
        jobs = _exists(f"{folder}/{layout.JOBS}")
        return _read(folder, name, holder, jobs) if holder is not None or jobs else None
    except Unreadable as error:
        return _Found(Standing(name, f"cannot be read ({error})"))


def _read(folder: str, name: str, holder: Holder | None, jobs: bool) -> _Found:
    ended = _exists(f"{folder}/{layout.FINISHED}")
    held: bool | None = False
    if holder is not None:
        held = holder.held
        if held is None:
            held = False if ended else holder.goes_on()
    job, since = (None, 0.0) if holder is None else (holder.job, holder.since)
    submissions, results = _submissions(f"{folder}/{layout.JOBS}") if jobs else ([], False)
    newer = max((script for script in submissions if script[0] > since), default=None)
    if newer is not None and not held:
        job = newer[1]
    step, last, best, best_step = _newest(f"{folder}/{layout.METRICS}")
    about = Standing(name, "", step, last, best, best_step, job)
    return _Found(about, held, holder is not None, ended, job is not None or results)


def _with_state(found: _Found, states: Mapping[str, str]) -> Standing:
    about = found.standing
    if about.state:
        return about
    of_job = states.get(about.job) if about.job else None
    if found.held or (found.held is None and of_job == "RUNNING"):
        now = "running"
    elif of_job in _WAITING:
        now = "queued"
    elif found.ended:
        now = "ended"
    elif of_job == "RUNNING":
        now = "starting"
    elif found.begun:
        now = "interrupted"
    else:
        now = "failed" if found.failed else "submitted"
    return replace(about, state=now, job_state=of_job)


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise Unreadable(f"{os.path.basename(path)}: {error.strerror}") from None
    return True


def _submissions(jobs: str) -> tuple[list[tuple[float, str]], bool]:
    """(time, Slurm job) of each submission, and whether a job that was no Slurm's left a result."""
    found, results = [], False
    try:
        with os.scandir(jobs) as entries:
            for entry in entries:
                results |= entry.name.endswith(layout.RESULT)
                if entry.name.endswith(layout.SUBMISSION):
                    found.append((entry.stat().st_mtime, entry.name.removesuffix(layout.SUBMISSION)))
    except OSError as error:
        raise Unreadable(f"{os.path.basename(jobs)}: {error.strerror}") from None
    return found, results


_Score = tuple[str, str, float | None]


def _newest(metrics: str) -> tuple[int | None, _Score | None, _Score | None, int | None]:
    """Newest step that was written down, newest and best score of validation, and the step of the best.

    Raises:
        Unreadable: the file is there, and its end holds nothing of ours.
    """
    step: int | None = None
    number = 0
    try:
        for event in newest_events(metrics):
            number += 1
            if step is None:
                step = _whole(event.get("step"))
            if event.get("event") == "validation":
                return (step, *_scores(event))
    except FileNotFoundError:
        return None, None, None, None
    if number == 0 and read_start(metrics, 1):
        raise Unreadable(f"{os.path.basename(metrics)}: its end holds no lines of a run")
    return step, None, None, None


def _scores(event: dict[str, Any]) -> tuple[_Score | None, _Score | None, int | None]:
    split = str(event.get("split", ""))
    regions = event.get("scores")
    values = regions.get("all") if isinstance(regions, dict) else None
    values = values if isinstance(values, dict) else {}
    name = next((name for name in values if name != "loss"), None)
    last = None if name is None else (split, str(name), _number(values.get(name)))
    best = event.get("best")
    if not isinstance(best, dict):  # of a run from before this was written down
        return last, None, None
    chosen = str(best.get("score"))
    if chosen in values:
        last = (split, chosen, _number(values.get(chosen)))
    return last, (split, chosen, _number(best.get("value"))), _whole(best.get("step"))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e308 else None
