"""The Slurm job that this process belongs to: its state, and its way back into the queue.

A run that was signalled to stop has saved its state and is to go on. Only a job that Slurm still counts as RUNNING is
requeued: one that was cancelled must not rise again, one that was preempted is requeued by Slurm itself.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smoe_hpc.launch.ranks import PSEUDO_STEP_IDS

_SECONDS = 60  # a busy controller may take that long to answer
# Slurm sends SIGTERM to every process of a job that it requeues: also to the one that called scontrol, before scontrol returns
_REQUEUE = ("sh", "-c", 'trap "" TERM; exec scontrol requeue "$1"', "sh")
_LEAVING = "it is leaving, and Slurm decides what follows (a requeued job goes on by itself)"


@dataclass(frozen=True)
class Requeue:
    """Whether the job went back into the queue.

    Args:
        done: whether it did.
        why: in words, for the log.
    """

    done: bool
    why: str


def job_id(environ: Mapping[str, str]) -> str | None:
    """The Slurm job whose step this process is, in the form scontrol takes (an array's task as 12_3); None outside of one.

    A process that was merely started inside an allocation (by hand, by a batch script without srun) belongs to no step.
    """
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= PSEUDO_STEP_IDS:
        return None
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def job_state(job: str) -> str | None:
    """State of a Slurm job as Slurm words it, e.g. "PENDING", "RUNNING", "CANCELLED"; None where it is unknown.

    Queries squeue, then scontrol (which remembers a job for minutes), then sacct (where there is accounting).
    """
    words = _answer("squeue", "--noheader", "--jobs", job, "--format=%T")
    if words:
        return words[0]
    for word in _answer("scontrol", "show", "job", job, "--oneliner"):
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    words = _answer("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    return words[0] if words else None


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """States of several Slurm jobs, those that somebody knows, with one query for all of them; as `job_state`."""
    wanted = list(dict.fromkeys(jobs))
    if len(wanted) < 2:
        return {job: state for job in wanted if (state := job_state(job)) is not None}
    found: dict[str, str] = {}
    for words in _lines("squeue", "--noheader", "--array", f"--jobs={','.join(wanted)}", "--format=%i %T"):
        if len(words) == 2:
            found[words[0]] = words[1]
    if not found.keys() >= set(wanted):
        for words in _lines("scontrol", "show", "job", "--oneliner"):
            said = dict(word.split("=", 1) for word in words if "=" in word)
            if "JobState" in said:
                whole = f"{said['ArrayJobId']}_{said['ArrayTaskId']}" if "ArrayTaskId" in said else said.get("JobId", "")
                found.setdefault(whole, said["JobState"])
    left = [job for job in wanted if job not in found]
    if left:
        query = ("--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={','.join(left)}")
        for words in _lines("sacct", *query):
            job, bar, state = words[0].partition("|")
            if bar and state:
                found.setdefault(job, state)
    return {job: found[job] for job in wanted if job in found}


def node_address(node: str) -> str | None:
    """Where Slurm reaches a node, by its name in Slurm; None where Slurm does not know it."""
    for word in _answer("scontrol", "show", "node", node, "--oneliner"):
        if word.startswith("NodeAddr="):
            return word.removeprefix("NodeAddr=")
    return None


def requeue_if_running(environ: Mapping[str, str]) -> Requeue:
    """Put this process's job back into the queue if that is right; for one rank, after all ranks have saved.

    Args:
        environ: of this process. SMOE_REQUEUE=0 forbids it.
    """
    job = job_id(environ)
    if job is None:
        return Requeue(False, "this is no step of a Slurm job")
    if environ.get("SMOE_REQUEUE", "1") == "0":
        return Requeue(False, f"job {job} is not requeued (SMOE_REQUEUE=0)")
    state = job_state(job)
    if state != "RUNNING":
        return Requeue(False, f"job {job} is {state or 'unknown to Slurm'}: {_LEAVING}")
    try:
        done = subprocess.run([*_REQUEUE, job], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Requeue(False, f"job {job} could not be requeued ({error}); submit it again")
    if done.returncode:
        return Requeue(False, f"job {job} could not be requeued ({done.stderr.strip()}); submit it again")
    return Requeue(True, f"job {job} is requeued")


def _answer(*command: str) -> Sequence[str]:
    """Words of the first line that a Slurm command prints; none where it is missing, fails or takes too long."""
    return next(iter(_lines(*command)), [])


def _lines(*command: str) -> list[list[str]]:
    """Words of each line that a Slurm command prints; none where it is missing, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
