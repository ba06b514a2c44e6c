"""A submitted run: its state, its logs, its result."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoe_hpc.errors import LaunchError, RunError
from smoe_hpc.jobs.folder import read_outcome
from smoe_hpc.launch.job import job_state

UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "RESIZING", "SUSPENDED", "STOPPED", "PREEMPTED")
_GRACE = 15.0  # seconds that a file of another host may take to be seen here


@dataclass(frozen=True)
class Job:
    """A submitted run.

    Attributes:
        id: of the job, as its cluster counts.
        run_dir: where the run writes; its scores.json is the result.
        cluster: "slurm", "local" or "debug".
        tasks: number of its processes.
    """

    id: str
    run_dir: Path
    cluster: str
    tasks: int
    _handle: Any = field(repr=False)

    @property
    def state(self) -> str:
        """In Slurm's words: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...; UNKNOWN where nobody knows."""
        if self.cluster == "slurm":
            return job_state(self.id) or ("COMPLETED" if self._left(0) else "UNKNOWN")
        if self.cluster == "local" and not self._handle.done():
            return "RUNNING"
        if self.cluster == "debug":
            return {"DONE": "COMPLETED", "QUEUED": "PENDING"}.get(self._handle.state, self._handle.state)
        if not self._left(0):
            return "CANCELLED"
        return "COMPLETED" if self._failure() is None else "FAILED"

    def log(self, rank: int = 0) -> str:
        """What a rank has printed so far, errors after the rest; "" before it began."""
        texts = (path.read_text(errors="replace") for path in self.logs(rank) if path.is_file())
        return "".join(texts)

    def logs(self, rank: int = 0) -> tuple[Path, Path]:
        """The files of a rank's stdout and stderr. LaunchError if there is no such rank."""
        if not 0 <= rank < self.tasks:
            raise LaunchError(f"job {self.id} has no rank {rank}: it has {self.tasks}, counted from 0")
        paths = self._handle.task(rank).paths
        return paths.stdout, paths.stderr

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the end; {split: {region: {score: value}}} as in scores.json. A requeued job is waited for as well.

        Args:
            timeout: seconds to wait at most.

        Raises:
            RunError: the job failed, was cancelled or ran out of time; it says how and where the log is. Or what it left
                is no result: nothing of it is loaded.
            LaunchError: it had not ended when the timeout was over.
        """
        if self.cluster == "debug":
            scores: dict[str, Any] = self._handle.result()
            return scores
        end = None if timeout is None else time.monotonic() + timeout
        for pause in itertools.chain((0.2, 0.5, 1.0, 2.0), itertools.repeat(5.0)):
            state = self.state
            if state not in UNFINISHED:
                break
            if end is not None and time.monotonic() > end:
                raise LaunchError(f"job {self.id} is {state} and has not ended within {timeout:g} s; wait longer, or cancel it")
            time.sleep(pause)
        if state in ("COMPLETED", "UNKNOWN"):
            self._wait_for_files()
        failure = self._failure()
        if failure is None and self._left(0):
            result: dict[str, Any] = read_outcome(self._outcome(0))[1]
            return result
        raise RunError(f"job {self.id} ended as {state}: {failure or 'it left no result'}; its log is {self.logs()[1]}")

    def cancel(self) -> None:
        """Ask the job to stop for good: it saves if it can, and is not requeued. The same submission goes on from there."""
        self._handle.cancel()

    def _left(self, rank: int) -> bool:
        """Whether a rank has left a result, good or bad."""
        return self._outcome(rank).exists()

    def _outcome(self, rank: int) -> Path:
        path: Path = self._handle.task(rank).paths.result_pickle
        return path

    def _wait_for_files(self) -> None:
        end = time.monotonic() + _GRACE
        while not self._left(0) and time.monotonic() < end:
            time.sleep(0.2)

    def _failure(self) -> str | None:
        """Last line of the first failed rank's error."""
        for rank in filter(self._left, range(self.tasks)):
            kind, text = read_outcome(self._outcome(rank))
            if kind == "error":
                lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
                return re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[-1]) if lines else "it did not say why"
        return None
