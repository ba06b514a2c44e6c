"""Training as a job that Python submits: to Slurm, or to this machine as if it were one.

submitit writes the job, starts its tasks and keeps their logs; each task is a process of the run and finds the others as
one that srun started does (`ranks.py`). The recipe is checked, and written down as it stands, before anything is queued;
the rooms that know recipes are imported when they are called.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import time as clock
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoe_hpc.errors import DataError, LaunchError, RunError
from smoe_hpc.launch.job import job_state
from smoe_hpc.launch.submitted import run_task

CLUSTERS = ("slurm", "local", "debug")
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "RESIZING", "SUSPENDED", "STOPPED", "PREEMPTED")
WARNING = 300  # seconds before the end of its time at which a job is asked to save; a third of a short one
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
        texts = (path.read_text(errors="replace") for path in self.logs(rank) if path.exists())
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
            RunError: the job failed, was cancelled or ran out of time; it says how and where the log is.
            LaunchError: it had not ended when the timeout was over.
        """
        if self.cluster == "debug":
            scores: dict[str, Any] = self._handle.result()
            return scores
        end = None if timeout is None else clock.monotonic() + timeout
        for pause in itertools.chain((0.2, 0.5, 1.0, 2.0), itertools.repeat(5.0)):
            state = self.state
            if state not in UNFINISHED:
                break
            if end is not None and clock.monotonic() > end:
                raise LaunchError(f"job {self.id} is {state} and has not ended within {timeout:g} s; wait longer, or cancel it")
            clock.sleep(pause)
        if state in ("COMPLETED", "UNKNOWN"):
            self._wait_for_files()
        failure = self._failure()
        if failure is None and self._left(0):
            result: dict[str, Any] = self._handle.task(0).result()
            return result
        raise RunError(f"job {self.id} ended as {state}: {failure or 'it left no result'}; its log is {self.logs()[1]}")

    def cancel(self) -> None:
        """Ask the job to stop for good: it saves if it can, and is not requeued. The same submission goes on from there."""
        self._handle.cancel()

    def _left(self, rank: int) -> bool:
        """Whether a rank has left a result, good or bad."""
        return bool(self._handle.task(rank).paths.result_pickle.exists())

    def _wait_for_files(self) -> None:
        end = clock.monotonic() + _GRACE
        while not self._left(0) and clock.monotonic() < end:
            clock.sleep(0.2)

    def _failure(self) -> str | None:
        """Last line of the first failed rank's error."""
        for rank in filter(self._left, range(self.tasks)):
            error = self._handle.task(rank).exception()
            if error is not None:
                trace = str(error).partition("You can check full logs")[0]  # submitit's own addition
                lines = [line.strip() for line in trace.splitlines() if line.strip(" -")]
                return re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[-1]) if lines else type(error).__name__
        return None


def submit(
    recipe: str | os.PathLike[str],
    changes: Mapping[str, Any] | None = None,
    *,
    nodes: int = 1,
    gpus_per_node: int = 0,
    tasks_per_node: int | None = None,
    cpus_per_task: int = 1,
    cluster: str = "slurm",
    time: int = 24 * 60,
    partition: str | None = None,
    account: str | None = None,
    root: str | os.PathLike[str] | None = None,
    sbatch: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Job:
    """Train a recipe as a job, and go on with it whenever its time is up or its nodes are taken.

    >>> job = submit("heat_smoe", {"training.batch": 64}, nodes=2, gpus_per_node=4)  # doctest: +SKIP
    >>> job.state, job.result()["test"]["all"]  # doctest: +SKIP

    Args:
        recipe: a name from `smoe-hpc recipes`, or a YAML file.
        changes: to the recipe, by dotted key.
        nodes: how many; more than one on "slurm" only.
        gpus_per_node: of each node; one task trains on each. 0 trains on CPUs.
        tasks_per_node: number of processes of each node; with GPUs as many as those.
        cpus_per_task: cores of each process ("slurm").
        cluster: "slurm"; "local": processes of this machine; "debug": in this process, when `Job.result` is called.
        time: minutes after which the job is stopped, and requeued on Slurm.
        partition: Slurm's, its default if not given.
        account: Slurm's, the user's default if not given.
        root: folder of runs instead of the recipe's run.root.
        sbatch: more options of sbatch, e.g. {"mem": "64G", "constraint": "h200"}.
        **overrides: more changes, with ``__`` for the dot: ``training__batch=64``.

    Raises:
        ConfigError: the recipe, a change, or the number of processes cannot be.
        DataError: there is nothing where the recipe's data are to be.
        LaunchError: the cluster does not take the job.
    """
    from smoe_hpc.config import check_world, load_recipe, to_yaml

    tasks = _tasks_per_node(cluster, nodes, gpus_per_node, tasks_per_node, time)
    pairs = [*dict(changes or {}).items(), *((key.replace("__", "."), value) for key, value in overrides.items())]
    if root is not None:
        pairs.append(("run.root", os.fspath(root)))
    loaded = load_recipe(os.fspath(recipe), [f"{key}={_as_text(value)}" for key, value in pairs])
    check_world(loaded, nodes * tasks)
    _require_data(loaded.data.store)
    run_dir = (Path(loaded.run.root) / loaded.name).absolute()
    folder = run_dir / "jobs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"recipe_{uuid.uuid4().hex[:8]}.yaml"
        written.write_text(to_yaml(loaded), encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written ({error.strerror}); choose another root") from None
    options: dict[str, Any] = {"timeout_min": time, "nodes": nodes, "tasks_per_node": tasks, "gpus_per_node": gpus_per_node}
    if cluster == "slurm":
        warning = min(WARNING, time * 60 // 3)
        options |= _slurm_options(loaded.name, cpus_per_task, partition, account, warning, dict(sbatch or {}))
    with _package_on_path():
        handle = _hand_over(cluster, folder, options, written, run_dir)
    return Job(handle.job_id, run_dir, cluster, nodes * tasks, handle)


def _tasks_per_node(cluster: str, nodes: int, gpus: int, tasks: int | None, minutes: int) -> int:
    if cluster not in CLUSTERS:
        raise LaunchError(f"cluster={cluster!r} is none of {', '.join(CLUSTERS)}")
    for name, value, least in (("nodes", nodes, 1), ("gpus_per_node", gpus, 0), ("time", minutes, 1)):
        if not isinstance(value, int) or value < least:
            raise LaunchError(f"{name}={value!r}: must be a whole number from {least} on")
    if cluster != "slurm" and nodes > 1:
        raise LaunchError(f"nodes={nodes}: cluster {cluster!r} is this one machine; use cluster='slurm', or tasks_per_node")
    if tasks is not None and tasks < 1:
        raise LaunchError(f"tasks_per_node={tasks}: must be 1 or more")
    if gpus and tasks not in (None, gpus):
        raise LaunchError(f"tasks_per_node={tasks} with gpus_per_node={gpus}: each process takes one GPU; leave one out")
    found = tasks or gpus or 1
    if cluster == "debug" and found > 1:
        raise LaunchError(f"{found} processes: cluster 'debug' is this one process; use cluster='local'")
    return found


def _require_data(store: str) -> None:
    """Nothing is read: the job does, and it may see more than the machine on which it is submitted."""
    if not (os.path.exists(store) or glob.glob(store)):
        raise DataError(
            f"no data at {Path(store).absolute()}: set data.store to the converted data, or make some there first with "
            "`smoe-hpc data convert`, `heat` or `synthesize`; nothing was queued"
        )


def _as_text(value: Any) -> str:
    """A value as an override has it: strings and paths as they are, everything else as JSON, which YAML reads."""
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else json.dumps(value)


def _slurm_options(
    name: str, cpus_per_task: int, partition: str | None, account: str | None, warning: int, more: dict[str, Any]
) -> dict[str, Any]:
    given = {"partition": partition, "account": account}
    more = {"requeue": True, **more}
    return {
        "name": name,
        "cpus_per_task": cpus_per_task,
        "slurm_signal_delay_s": warning,
        # srun does not take the cores from sbatch; without an MPI the tasks go by what srun says
        "slurm_setup": [f"export SRUN_CPUS_PER_TASK={cpus_per_task} OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus_per_task}}}"],
        "slurm_srun_args": ["--mpi=none", "--wait=120"],
        "slurm_additional_parameters": more,
        **{f"slurm_{key}": value for key, value in given.items() if value is not None},
    }


def _hand_over(cluster: str, folder: Path, options: dict[str, Any], recipe: Path, run_dir: Path) -> Any:
    """submitit's handle of the job."""
    import submitit
    from submitit.core.utils import FailedJobError

    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**options)
        return executor.submit(run_task, recipe, run_dir)
    except (RuntimeError, ValueError, OSError, FailedJobError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LaunchError(f"{cluster} does not take the job: {lines[-1] if lines else error}") from error


@contextlib.contextmanager
def _package_on_path() -> Iterator[None]:
    """PYTHONPATH leads to this package, for jobs that start from a checkout that is not installed."""
    import smoe_hpc

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(smoe_hpc.__file__).parent.parent), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
