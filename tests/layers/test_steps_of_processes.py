"""The end of a step where processes have run different layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import branches

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes of ``two_processes.py`` have left."""
    folder = tmp_path_factory.mktemp("two")
    script = [str(Path(__file__).with_name("two_processes.py")), str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_what_is_renewed_does_not_depend_on_which_process_ran_it(ended: Path):
    (first, of_first), (second, of_second) = (torch.load(ended / f"branches{rank}.pt") for rank in range(2))
    assert of_first == of_second  # or records of processes could not be added up
    alone = branches.branches()
    for step, (of_rank_0, of_rank_1) in enumerate(branches.SCHEDULE):
        branches.run(alone, of_rank_0 + of_rank_1, step)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if "running" in name or "renewals" in name:
            torch.testing.assert_close(first[name], value, rtol=1e-6, atol=0)
    assert [int(first[f"{branch}.0.running_steps"]) for branch in range(2)] == [2, 1]


@pytest.mark.parametrize("count", [12, torch.tensor(12.0)])
def test_a_mean_of_errors_takes_nothing_from_a_step_in_which_the_layer_did_not_run(count: int | torch.Tensor):
    layer = branches.branches()[0][0]
    layer.update_running_error(torch.full(branches.GRIDS[0], 24.0), count)
    assert (layer.running_error == 2).all()
    layer.update_running_error(torch.zeros(branches.GRIDS[0]), count * 0)
    assert (layer.running_error == 2).all()
    assert layer.running_steps == 1


def test_parameters_that_are_spread_over_processes_learn_as_replicas_do(ended: Path):
    for rank in range(2):
        ways, refused = torch.load(ended / f"sharding{rank}.pt")
        expected = ways.pop("ddp")
        assert expected["groups"] == {"experts_and_kernels": 2, "biases": 2, "gates": 2}
        assert expected["steps"][2]["selections_changed"] > 0
        for way, trained in ways.items():
            assert trained["groups"] == expected["groups"], way
            for ours, theirs in zip(trained["steps"], expected["steps"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), way
        one_flat_tensor, *parts = refused
        assert "use_orig_params=True" in one_flat_tensor
        assert len(parts) == 2
        assert all("holds a part of its parameters only" in said for said in parts)
