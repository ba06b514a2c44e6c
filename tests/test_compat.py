"""What other libraries keep to themselves does what we take it for (ZeRO's: tests/training/test_parallel.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smoe_hpc import compat
from smoe_hpc.jobs.folder import read_outcome
from smoe_hpc.launch.requirements import declared

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("library", ["deepspeed", "submitit"])
def test_versions_are_bounded_from_above(library: str) -> None:
    (line,) = (line for line in declared(ROOT / "setup.cfg", []) if line.startswith(library))
    assert ",<" in line


def test_tensors_are_flattened_and_come_back() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.ones(4)]
    flat = compat.flattened(tensors)
    assert flat.tolist() == [*range(6), 1, 1, 1, 1]
    assert all(torch.equal(one, other) for one, other in zip(compat.unflattened(flat, tensors), tensors, strict=True))


def test_many_tensors_are_scaled_at_once() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
    assert [norm.item() for norm in compat.norms(tensors)] == [5.0, 2.0]
    compat.scale_(tensors, torch.tensor(0.5))
    assert [tensor.tolist() for tensor in tensors] == [[1.5, 2.0], [1.0]]


def test_process_groups_and_their_store() -> None:
    code = (
        "import datetime, torch.distributed as dist\n"
        "from smoe_hpc import compat\n"
        "try: compat.default_store()\n"
        "except (RuntimeError, ValueError): print('none')\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "(group,) = compat.process_groups()\n"
        "compat.set_time_out(group, datetime.timedelta(seconds=7))\n"
        "compat.default_store().set('a', 'b')\n"
        "print(group._get_backend(__import__('torch').device('cpu')).options._timeout.total_seconds())\n"
        "dist.destroy_process_group()\n"
        "compat.forget_deepspeed_groups()\n"
        "import sys; print('deepspeed' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["none", "7.0", "False"], done.stderr


def test_an_outcome_is_left_as_submitit_leaves_it(tmp_path: Path) -> None:
    compat.leave_outcome(tmp_path / "1_0_result.pkl", ("error", "no data"))
    assert read_outcome(tmp_path / "1_0_result.pkl") == ("error", "no data")
    assert len(list(tmp_path.iterdir())) == 1
    assert all(issubclass(error, Exception) for error in compat.submission_errors())
