"""The ladder of time-outs: one number, and what must be longer than it."""

import pytest

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.patience import Patience, patience


def test_by_default_five_minutes() -> None:
    assert patience({}) == Patience(beat=2.0, wait=300, nccl=360, heartbeat=600)


def test_each_is_shorter_than_the_next() -> None:
    for seconds in (1, 5, 60, 299, 3600, 86400):
        found = patience({"SMOE_TIMEOUT": str(seconds)})
        assert found.wait == seconds
        assert found.beat < found.wait < found.nccl < found.heartbeat


@pytest.mark.parametrize("wrong", ["0", "-3", "five", "1e3", "999999999", "5.0"])
def test_what_is_no_number_of_seconds_is_refused(wrong: str) -> None:
    with pytest.raises(LaunchError, match="whole number of seconds from 1 to 604800"):
        patience({"SMOE_TIMEOUT": wrong})


def test_torch_must_not_end_processes_first() -> None:
    with pytest.raises(LaunchError, match="TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=300 would end processes before"):
        patience({"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "300"})
    assert patience({"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "300", "SMOE_TIMEOUT": "200"}).heartbeat == 300


def test_longer_than_slurms_warning_is_told() -> None:
    with pytest.warns(UserWarning, match="SMOE_TIMEOUT=900 is longer than the 300 s between Slurm's signal and the end"):
        patience({"SMOE_TIMEOUT": "900", "SLURM_JOB_ID": "7"})
