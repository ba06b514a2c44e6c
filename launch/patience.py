"""How long do the processes of a job wait for one that does not come? One number, and all that follows from it.

``SMOE_TIMEOUT`` is that number, in seconds. What must be longer or shorter than it is derived here, and what somebody else
has set is held against it before anything waits: a time-out that ends the process before ours has spoken would leave a job
that ended without a message.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from smoe_hpc.errors import LaunchError

VARIABLE = "SMOE_TIMEOUT"
HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"  # torch's monitor of NCCL's watchdog, which ends the process
_DEFAULT = 300
_MOST = 7 * 24 * 3600
_LATER = 60  # seconds between two time-outs of which the first must have spoken
_HEARTBEAT_LEAST = 600
SLURM_WARNING = 300  # seconds between Slurm's signal and the end of a job, as our scripts ask for them


@dataclass(frozen=True)
class Patience:
    """The ladder of time-outs, in seconds, each shorter than the next.

    Attributes:
        beat: between two signs of life of a process.
        wait: for a process that does not come: at the start, in a collective on gloo, at the store.
        nccl: of a collective on NCCL, whose watchdog ends the process: it lets the message come first.
        heartbeat: after which torch takes NCCL's watchdog itself for dead.
    """

    beat: float
    wait: float
    nccl: float
    heartbeat: float

    @property
    def timeout(self) -> timedelta:
        """``wait`` as torch takes it."""
        return timedelta(seconds=self.wait)


def patience(environ: Mapping[str, str]) -> Patience:
    """The ladder as the environment has it; pure but for its warning.

    Raises:
        LaunchError: SMOE_TIMEOUT that is no number of seconds, or a time-out of torch that comes before ours.

    Warns:
        UserWarning: in a Slurm job, where it is longer than Slurm's warning.
    """
    text = environ.get(VARIABLE, "").strip() or str(_DEFAULT)
    if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= _MOST:
        raise LaunchError(
            f"{VARIABLE}={text!r}: how long processes wait for each other is a whole number of seconds from 1 to {_MOST}; "
            f"unset it for {_DEFAULT}"
        )
    wait = int(text)
    nccl = wait + _LATER
    given = environ.get(HEARTBEAT, "").strip()
    heartbeat = int(given) if given.isdigit() else max(nccl + _LATER, _HEARTBEAT_LEAST)
    if heartbeat <= nccl:
        raise LaunchError(
            f"{HEARTBEAT}={heartbeat} would end processes before NCCL's own time-out of {nccl} s ({VARIABLE} and {_LATER}); "
            f"unset it, or set {VARIABLE} to less than {max(heartbeat - _LATER, 1)}"
        )
    if wait > SLURM_WARNING and "SLURM_JOB_ID" in environ:
        warnings.warn(
            f"{VARIABLE}={wait} is longer than the {SLURM_WARNING} s between Slurm's signal and the end of the job: a process "
            f"that stops in them is not named; give sbatch --signal=USR1@{wait + _LATER} or more",
            UserWarning,
            stacklevel=2,
        )
    return Patience(beat=min(2.0, wait / 10), wait=wait, nccl=nccl, heartbeat=heartbeat)
