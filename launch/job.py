"""The Slurm job that this process belongs to: its state, and its way back into the queue.

A run that was asked to stop has saved its state and wants to go on. Only a job that Slurm still counts as RUNNING is
requeued: one that was cancelled must not rise again, one that was preempted is requeued by Slurm itself.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smoe_hpc.launch.ranks import PSEUDO_STEP_IDS

_SECONDS = 60  # a busy controller may take that long to answer
# Slurm sends SIGTERM to every process of a job that it requeues: to the one that asked it as well, before it has the answer
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
    """State of a Slurm job as Slurm words it, e.g. "PENDING", "RUNNING", "CANCELLED"; None where nobody knows it.

    Asks squeue, then scontrol (which remembers a job for minutes), then sacct (where there is accounting).
    """
    words = _answer("squeue", "--noheader", "--jobs", job, "--format=%T")
    if words:
        return words[0]
    for word in _answer("scontrol", "show", "job", job, "--oneliner"):
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    words = _answer("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    return words[0] if words else None


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
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines[0].split() if lines and done.returncode == 0 else []
