"""Training as a job that Python submits: to Slurm, or to this machine as if it were one.

submitit writes the job, starts its tasks and keeps their logs; each task is a process of the run and finds the others as
one that srun started does (`ranks.py`). The recipe is checked, and written down as it stands, before anything is queued.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from smoe_hpc import compat
from smoe_hpc.config import check_world, load_recipe, to_yaml
from smoe_hpc.config.changes import as_overrides
from smoe_hpc.config.making import require_data
from smoe_hpc.errors import DataError, LaunchError
from smoe_hpc.jobs.folder import closed, make_own
from smoe_hpc.jobs.job import Job
from smoe_hpc.jobs.options import package_on_path, slurm_options, tasks_of_each_node
from smoe_hpc.jobs.submitted import run_task
from smoe_hpc.runs.directory import RunDirectory

WARNING = 300  # seconds before the end of its time at which a job is signalled to save; a third of its time if that is shorter


def submit(
    recipe: str | os.PathLike[str],
    changes: Mapping[str, Any] | None = None,
    *,
    nodes: int = 1,
    gpus_per_node: int = 0,
    tasks_per_node: int | None = None,
    cpus_per_task: int = 1,
    cluster: Literal["slurm", "local", "debug"] = "slurm",
    time: int = 24 * 60,
    partition: str | None = None,
    account: str | None = None,
    root: str | os.PathLike[str] | None = None,
    sbatch: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Job:
    """Train a recipe as a job, and go on with it whenever its time is up or its nodes are taken.

    ::

        job = submit("heat_smoe", {"training.batch": 64}, nodes=2, gpus_per_node=4)
        job.state, job.result()["test"]["all"]

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
        ConfigError: an invalid recipe or change, or a number of processes that cannot share the batch.
        DataError: there is nothing where the recipe's data should be.
        LaunchError: the cluster does not take the job, or others could change what it runs.
    """
    tasks = tasks_of_each_node(cluster, nodes, gpus_per_node, tasks_per_node, time)
    given = {**(changes or {}), **{key.replace("__", "."): value for key, value in overrides.items()}}
    if root is not None:
        given["run.root"] = root
    loaded = load_recipe(os.fspath(recipe), as_overrides(given))
    check_world(loaded, nodes * tasks)
    try:  # nothing is opened: the job does that, and it may see more than the machine on which it is submitted
        require_data(loaded)
    except DataError as error:
        raise DataError(f"{error}; nothing was queued") from None
    run = RunDirectory(RunDirectory.of(loaded).path.absolute())
    folder = run.jobs
    make_own(folder)
    try:
        written = folder / f"recipe_{uuid.uuid4().hex[:8]}.yaml"
        written.write_text(to_yaml(loaded), encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written ({error.strerror}); choose another root") from None
    options: dict[str, Any] = {"timeout_min": time, "nodes": nodes, "tasks_per_node": tasks, "gpus_per_node": gpus_per_node}
    if cluster == "slurm":
        warning = min(WARNING, time * 60 // 3)
        options |= slurm_options(loaded.name, cpus_per_task, partition, account, warning, dict(sbatch or {}))
    with package_on_path():
        handle = _hand_over(cluster, folder, options, written, run.path)
    return Job(handle.job_id, run.path, cluster, nodes * tasks, handle)


def _hand_over(cluster: str, folder: Path, options: dict[str, Any], recipe: Path, run_dir: Path) -> Any:
    """Queue the job; submitit's handle of it."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**options)
        with closed(folder):
            return executor.submit(run_task, recipe, run_dir)
    except compat.submission_errors() as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LaunchError(f"{cluster} does not take the job: {lines[-1] if lines else error}") from error
