"""The options of a job, as its cluster takes them."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smoe_hpc
from smoe_hpc.errors import LaunchError

CLUSTERS = ("slurm", "local", "debug")


def tasks_of_each_node(cluster: str, nodes: int, gpus: int, tasks: int | None, minutes: int) -> int:
    """Number of processes of each node.

    Args:
        cluster: one of CLUSTERS.
        nodes: how many.
        gpus: of each node.
        tasks: of each node, if they were given.
        minutes: that the job may take.

    Raises:
        LaunchError: a value that is none, or values that do not fit together.
    """
    if cluster not in CLUSTERS:
        raise LaunchError(f"cluster={cluster!r} is none of {', '.join(CLUSTERS)}")
    for name, value, least in (("nodes", nodes, 1), ("gpus_per_node", gpus, 0), ("time", minutes, 1)):
        if not isinstance(value, int) or value < least:
            raise LaunchError(f"{name}={value!r}: must be a whole number of at least {least}")
    if cluster != "slurm" and nodes > 1:
        raise LaunchError(f"nodes={nodes}: cluster {cluster!r} is this one machine; use cluster='slurm', or tasks_per_node")
    if tasks is not None and tasks < 1:
        raise LaunchError(f"tasks_per_node={tasks}: must be at least 1")
    if gpus and tasks not in (None, gpus):
        raise LaunchError(f"tasks_per_node={tasks} with gpus_per_node={gpus}: each process takes one GPU; leave one out")
    found = tasks or gpus or 1
    if cluster == "debug" and found > 1:
        raise LaunchError(f"{found} processes: cluster 'debug' is this one process; use cluster='local'")
    return found


def slurm_options(
    name: str, cpus_per_task: int, partition: str | None, account: str | None, warning: int, more: dict[str, Any]
) -> dict[str, Any]:
    """submitit's parameters of a Slurm job.

    Args:
        name: of the job.
        cpus_per_task: cores of each process.
        partition, account: Slurm's; None for its defaults.
        warning: seconds before the end of its time at which the job is signalled.
        more: options of sbatch.
    """
    given = {"partition": partition, "account": account}
    more = {"requeue": True, **more}
    return {
        "name": name,
        "cpus_per_task": cpus_per_task,
        "slurm_signal_delay_s": warning,
        # srun does not take the cores from sbatch; the package must be found where sbatch exports nothing, too
        "slurm_setup": [
            f"export SRUN_CPUS_PER_TASK={cpus_per_task} OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus_per_task}}}",
            f"export PYTHONPATH={shlex.quote(_python_path())}",
        ],
        # the tasks get the job's environment whatever sbatch exports; without an MPI they go by what srun says
        "slurm_srun_args": ["--export=ALL", "--mpi=none", "--wait=120"],
        "slurm_additional_parameters": more,
        **{f"slurm_{key}": value for key, value in given.items() if value is not None},
    }


@contextlib.contextmanager
def package_on_path() -> Iterator[None]:
    """PYTHONPATH leads to this package, for jobs that start from a checkout that is not installed."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _python_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(Path(smoe_hpc.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
