"""Who am I? Each launcher's variables as it sets them, and each way in which they can contradict each other."""

import pytest

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.ranks import LOOPBACK, Ranks, device_index, find_ranks, first_host

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": "4000"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_PROCID": "4",
    "SLURM_NODEID": "2",
}


LOCAL_SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "4711",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
}


def test_nothing_started_it() -> None:
    assert find_ranks({}) == Ranks(0, 1, 0, 1, LOOPBACK, None, "single")


def test_torchrun() -> None:
    assert find_ranks(TORCHRUN) == Ranks(5, 8, 1, 4, "node1", 29400, "torchrun")


def test_torchrun_once_a_host_under_another_launcher() -> None:
    assert find_ranks({**OPENMPI, **SRUN, **TORCHRUN}).launcher == "torchrun"


def test_variables_by_hand() -> None:
    assert find_ranks(BY_HAND) == Ranks(1, 2, 1, 2, LOOPBACK, 4000, "environment")
    assert find_ranks({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks(0, 1, 0, 1, LOOPBACK, None, "environment")


def test_openmpi_leaves_the_address_open() -> None:
    assert find_ranks(OPENMPI) == Ranks(3, 4, 1, 2, None, None, "openmpi")
    given = find_ranks({**OPENMPI, "MASTER_ADDR": "a", "MASTER_PORT": "5000"})
    assert (given.master_addr, given.master_port) == ("a", 5000)


def test_mpirun_under_slurm_is_not_srun() -> None:
    # mpirun's own helper is the task of the step that srun sees
    assert find_ranks({**SRUN, **OPENMPI}).launcher == "openmpi"
    assert find_ranks({**SRUN, **MPICH}) == Ranks(1, 2, 1, 2, None, None, "pmi")


def test_mpich() -> None:
    assert find_ranks(MPICH) == Ranks(1, 2, 1, 2, None, None, "pmi")


def test_srun() -> None:
    # nodes gpu07, gpu08, gpu09, gpu12 hold tasks 01 23 4 5
    ranks = find_ranks(SRUN)
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world) == (4, 6, 0, 1)
    assert (ranks.master_addr, ranks.launcher) == ("gpu07", "slurm")
    first = find_ranks({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"})
    assert first.local_world == 2
    assert first.master_port == ranks.master_port, "every task computes the same port"
    for change in ({"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        assert find_ranks({**SRUN, **change}).master_port != ranks.master_port


def test_srun_with_and_without_an_mpi() -> None:
    """--mpi=none and --mpi=pmix give no PMI_SIZE: the tasks go by what srun says. --mpi=pmi2 does, and numbers agree."""
    pmix = {"PMIX_RANK": "4", "PMIX_NAMESPACE": "slurm.pmix.77.0", "PMIX_SERVER_URI41": "pmix-server;tcp4://127.0.0.1:1"}
    assert find_ranks({**SRUN, **pmix}) == find_ranks(SRUN)
    pmi2 = find_ranks({**SRUN, "PMI_FD": "12", "PMI_RANK": "4", "PMI_SIZE": "6"})
    assert (pmi2.rank, pmi2.world, pmi2.local_world, pmi2.launcher) == (4, 6, 1, "pmi")


def test_submitit() -> None:
    ranks = find_ranks(LOCAL_SUBMITIT)
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world) == (1, 2, 1, 2)
    assert (ranks.master_addr, ranks.launcher) == (LOOPBACK, "submitit")
    other = find_ranks({**LOCAL_SUBMITIT, "SUBMITIT_LOCAL_JOB_ID": "4712"})
    assert other.master_port != ranks.master_port, "two jobs on one machine do not meet"
    assert find_ranks({**SRUN, "SUBMITIT_EXECUTOR": "slurm"}).launcher == "slurm", "its tasks there are srun's"
    assert find_ranks({**SRUN, **LOCAL_SUBMITIT}).launcher == "submitit", "a local job inside an allocation"


def test_a_batch_script_is_one_process() -> None:
    assert find_ranks(BATCH).launcher == "single"
    assert find_ranks({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFA)}).launcher == "single"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({**BY_HAND, "RANK": "two"}, "RANK='two' is not a whole number"),
        ({**BY_HAND, "RANK": "2"}, "rank 2 of 2"),
        ({**BY_HAND, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({**BY_HAND, "MASTER_PORT": "70000"}, "port 70000"),
        ({k: v for k, v in BY_HAND.items() if k != "LOCAL_RANK"}, "LOCAL_RANK is not set"),
        ({k: v for k, v in BY_HAND.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
        ({k: v for k, v in BY_HAND.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
        ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "1"}, "openmpi says rank 3 of 4; unset RANK and WORLD_SIZE"),
        ({**LOCAL_SUBMITIT, "SUBMITIT_LOCAL_GLOBALID": "2"}, "submitit says rank 2 of 2"),
        ({**LOCAL_SUBMITIT, "RANK": "0", "WORLD_SIZE": "1"}, "submitit says rank 1 of 2; unset RANK and WORLD_SIZE"),
        ({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "1"}, "srun says task 4 of 6, PMI says rank 0 of 1"),
        # srun --mpi=pmi2 gives MPICH's variables to a program whose MPI is another one, or whose numbers make no sense
        ({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "12"}, "--mpi=none to start without an MPI"),
        ({**SRUN, "PMI_RANK": "6", "PMI_SIZE": "6"}, "pmi says rank 6 of 6"),
        ({k: v for k, v in OPENMPI.items() if "LOCAL_RANK" not in k}, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE='x'"),
        ({**SRUN, "SLURM_NODEID": "4"}, "names 4 nodes"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[1-2"}, "cannot be read; set MASTER_ADDR"),
    ],
)
def test_contradictions_are_errors(environ: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError) as caught:
        find_ranks(environ)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("a", "a"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[001,003-5],m", "n001"), ("r1n[2-3]-ib0,x", "r1n2-ib0")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_each_process_takes_its_own_gpu() -> None:
    ranks = Ranks(3, 4, 1, 2, "a", 1, "slurm")
    assert device_index(ranks, visible=2, bound=False) == 1
    assert device_index(ranks, visible=8, bound=True) == 1
    assert device_index(ranks, visible=1, bound=True) == 0, "srun --gpus-per-task=1 shows each task one GPU, number 0"
    for local_rank in (0, 1):
        with pytest.raises(LaunchError, match="2 processes on this host and 1 visible GPUs"):
            device_index(Ranks(local_rank, 2, local_rank, 2, "a", 1, "torchrun"), visible=1, bound=False)
    with pytest.raises(LaunchError, match=r"4 processes on this host and 2 visible GPUs.*start 2 a host, or train on the CPU"):
        device_index(Ranks(3, 8, 3, 4, "a", 1, "slurm"), visible=2, bound=True)
