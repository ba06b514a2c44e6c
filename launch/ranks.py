"""Who am I among the processes of a job? Read from the environment, and from nothing else.

Whatever started this process (torchrun, mpirun, srun, nothing) wrote its answer there. The number of processes is never
guessed: launchers that contradict each other are an error, because the alternative is every process training alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from smoe_hpc.errors import LaunchError

LOOPBACK = "127.0.0.1"
PORTS = range(20000, 32000)  # below those that Linux gives to outgoing connections (from 32768 on)
PSEUDO_STEP_IDS = 0xFFFFFFFA  # Slurm numbers its batch script, extern and interactive steps from here on: not srun's


@dataclass(frozen=True)
class Ranks:
    """One process among those of a job.

    Args:
        rank: number of this process, 0 <= rank < world.
        world: number of processes.
        local_rank: number of this process among those on its host.
        local_world: number of processes on its host.
        master_addr: host of rank 0; None where the launcher did not say and the ranks have yet to agree.
        master_port: port of rank 0 on which the group gathers; None likewise. 0, of a process that is alone, is a port
            that the system chooses when it listens.
        launcher: "torchrun", "environment", "openmpi", "pmi", "submitit", "slurm" or "single".

    Raises:
        LaunchError: numbers that contradict each other.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str | None
    master_port: int | None
    launcher: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise LaunchError(
                f"{self.launcher} says rank {self.rank} of {self.world}: ranks count from 0; check how the job was started"
            )
        if not 0 <= self.local_rank < self.local_world <= self.world:
            raise LaunchError(
                f"{self.launcher} says local rank {self.local_rank} of {self.local_world} on this host, in a world of "
                f"{self.world}: local ranks count from 0 and are no more than the world; check how the job was started"
            )
        lowest = 0 if self.world == 1 else 1
        if self.master_port is not None and not lowest <= self.master_port < 65536:
            raise LaunchError(f"{self.launcher} gives port {self.master_port}: a port lies in 1..65535; set MASTER_PORT")


def find_ranks(environ: Mapping[str, str]) -> Ranks:
    """Read from the environment which process this is; pure.

    Looked for in this order: torchrun, RANK and WORLD_SIZE set by somebody else, Open MPI's mpirun, an MPI of the PMI
    family (MPICH, Intel, Cray), submitit on this host, srun, nothing. The inner launcher wins (torchrun under srun,
    say); RANK and WORLD_SIZE that nobody can be seen to have set must agree with the others.

    Raises:
        LaunchError: a variable that is missing, is no number, or contradicts another launcher.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        ranks = _from_variables(environ)
        if ranks.launcher == "environment":  # torchrun may well run once per host under mpirun or srun
            _agree_on_world(ranks, _from_others(environ))
        return ranks
    return _from_others(environ) or Ranks(0, 1, 0, 1, LOOPBACK, None, "single")


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: ``"gpu[07-09,12],login1"`` -> ``"gpu07"``; pure.

    Raises:
        LaunchError: text that is no node list.
    """
    match = re.fullmatch(r"(?P<head>[\w.-]+)(\[(?P<first>\d+)[\d,-]*\](?P<tail>[\w.-]*))?(,.*)?", nodelist.strip())
    if match is None:
        raise LaunchError(f"Slurm's node list {nodelist!r} cannot be read; set MASTER_ADDR to the host of rank 0")
    return match["head"] + (match["first"] or "") + (match["tail"] or "")


def device_index(ranks: Ranks, visible: int, bound: bool) -> int:
    """Number of the GPU, among those visible, that this process takes; pure.

    Args:
        ranks: this process.
        visible: number of visible GPUs.
        bound: whether somebody restricted each process to its own GPU (``--gpus-per-task``, CUDA_VISIBLE_DEVICES).

    Raises:
        LaunchError: fewer GPUs than processes on this host.
    """
    if ranks.local_world <= visible:
        return ranks.local_rank
    if bound and visible == 1:
        return 0
    raise LaunchError(
        f"{ranks.local_world} processes on this host and {visible} visible GPUs: each process needs its own; "
        f"start {max(visible, 1)} a host, or train on the CPU"
    )


def _from_variables(environ: Mapping[str, str]) -> Ranks:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment"
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    alone = world == 1
    return Ranks(
        rank,
        world,
        _number(environ, "LOCAL_RANK", 0 if alone else None),
        _number(environ, "LOCAL_WORLD_SIZE", world),
        _text(environ, "MASTER_ADDR", LOOPBACK if alone else None),
        None if alone and "MASTER_PORT" not in environ else _number(environ, "MASTER_PORT"),
        launcher,
    )


def _from_others(environ: Mapping[str, str]) -> Ranks | None:
    readers = (_from_openmpi, _from_pmi, _from_submitit, _from_slurm)
    return next((found for found in (reader(environ) for reader in readers) if found is not None), None)


def _from_openmpi(environ: Mapping[str, str]) -> Ranks | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    world = _number(environ, "OMPI_COMM_WORLD_SIZE")
    rank = _number(environ, "OMPI_COMM_WORLD_RANK")
    local_rank = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    local_world = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", world)
    return Ranks(rank, world, local_rank, local_world, *_given_address(environ), "openmpi")


def _from_pmi(environ: Mapping[str, str]) -> Ranks | None:
    if "PMI_SIZE" not in environ:
        return None
    rank, world = _number(environ, "PMI_RANK"), _number(environ, "PMI_SIZE")
    step = _from_slurm(environ)
    # mpirun starts its own helpers with srun, one a host: beside a larger world a Slurm step of another size is natural
    if world == 1 and step is not None and step.world > 1:
        raise LaunchError(
            f"srun says task {step.rank} of {step.world}, PMI says rank {rank} of 1: srun did not pass this MPI its "
            "processes; try srun --mpi=pmi2 or --mpi=pmix, or --mpi=none to start without an MPI"
        )
    local_ranks = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID")
    local_rank = _first_number(environ, local_ranks, 0 if world == 1 else None)
    started_by_srun = step is not None and (step.rank, step.world) == (rank, world)  # whose PMI does not count a host's tasks
    on_host = step.local_world if step is not None and started_by_srun else world
    local_world = _first_number(environ, ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"), on_host)
    return Ranks(rank, world, local_rank, local_world, *_given_address(environ), "pmi")


def _from_submitit(environ: Mapping[str, str]) -> Ranks | None:
    """What submitit says of its tasks on this host (cluster "local"); those on Slurm are srun's tasks."""
    if environ.get("SUBMITIT_EXECUTOR") != "local" or "SUBMITIT_LOCAL_GLOBALID" not in environ:
        return None
    world = _number(environ, "SUBMITIT_LOCAL_NTASKS")
    addr, port = _given_address(environ)
    if port is None and world > 1:
        port = _hashed_port(_text(environ, "SUBMITIT_LOCAL_JOB_ID"))
    rank, local_rank = _number(environ, "SUBMITIT_LOCAL_GLOBALID"), _number(environ, "SUBMITIT_LOCAL_LOCALID")
    return Ranks(rank, world, local_rank, world, addr or LOOPBACK, port, "submitit")


def _from_slurm(environ: Mapping[str, str]) -> Ranks | None:
    """What srun says; None inside an allocation in which nothing was started by srun (a batch script, a login)."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    if _number(environ, "SLURM_STEP_ID") >= PSEUDO_STEP_IDS:
        return None
    world = _first_number(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), None)
    addr, port = _given_address(environ)
    if addr is None:
        addr = first_host(_text(environ, "SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST")))
    if port is None:
        # every task computes the same one; another step, job or restart computes another
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        port = _hashed_port(*(environ.get(name, "0") for name in names))
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", str(world))
    local_world = _tasks_on_node(tasks, _number(environ, "SLURM_NODEID", 0))
    return Ranks(_number(environ, "SLURM_PROCID"), world, _number(environ, "SLURM_LOCALID"), local_world, addr, port, "slurm")


def _hashed_port(*words: str) -> int:
    return PORTS[zlib.crc32(".".join(words).encode()) % len(PORTS)]


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Slurm's run-length form: ``"4(x2),1"`` means nodes with 4, 4 and 1 tasks."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} cannot be read; start the job with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID={node} but SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} names {len(counts)} nodes")
    return counts[node]


def _given_address(environ: Mapping[str, str]) -> tuple[str | None, int | None]:
    port = _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else None
    return environ.get("MASTER_ADDR") or None, port


def _agree_on_world(ranks: Ranks, other: Ranks | None) -> None:
    if other is not None and (ranks.world, ranks.rank) != (other.world, other.rank):
        raise LaunchError(
            f"RANK and WORLD_SIZE say rank {ranks.rank} of {ranks.world}, {other.launcher} says rank {other.rank} of "
            f"{other.world}; unset RANK and WORLD_SIZE, which somebody left in the environment"
        )


def _text(environ: Mapping[str, str], name: str, default: str | None = None) -> str:
    value = environ.get(name) or default
    if value is None:
        raise LaunchError(
            f"{name} is not set, though other variables say that this process is one of several; start with torchrun, "
            "mpirun or srun"
        )
    return value


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    text = _text(environ, name)
    if not re.fullmatch(r"-?\d+", text):
        raise LaunchError(f"{name}={text!r} is not a whole number; start with torchrun, mpirun or srun, or unset it")
    return int(text)


def _first_number(environ: Mapping[str, str], names: tuple[str, ...], default: int | None) -> int:
    present = [name for name in names if name in environ]
    return _number(environ, present[0] if present else names[0], default)
