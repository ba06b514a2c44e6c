"""The scripts that sbatch takes: what stands in them, and what they refuse. (With a real Slurm: tests/slurm.)"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from smoe_hpc.config import recipe_names

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("smoe_*deg.sh"))
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}


def bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines that use common.sh."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SMOE_", "CUDA_"))}
    command = ["bash", "-euo", "pipefail", "-c", f". {ROOT}/slurm/common.sh; {script}"]
    return subprocess.run(command, env={**environ, **variables}, capture_output=True, text=True, timeout=60)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_stands_in_the_scripts(path: Path) -> None:
    """Defaults come before the first command, where Slurm looks; the recipe is one of ours, and one of the script's name."""
    text = path.read_text()
    assert os.access(path, os.X_OK)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text.partition("set -euo")[0], re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "USR1@300", "to the steps, not to the batch shell"
    assert {"nodes", "requeue", "open-mode", "output", "time", "cpus-per-task"} <= set(options)
    recipe = re.search(r"^train_recipe (\w+) ", text, re.M)
    assert recipe is not None
    assert recipe[1] in recipe_names()
    assert recipe[1].endswith(path.stem)


def test_the_scripts_exist() -> None:
    assert {path.name for path in SCRIPTS} == {"smoe_1p4deg.sh", "smoe_5p625deg.sh"}


def test_the_scripts_differ_in_their_recipes_alone() -> None:
    """What finds the checkout has to stand in each of them; comments, the job's name and its time are the recipe's."""
    commands = [path.read_text().partition("\nset -euo pipefail\n")[2] for path in SCRIPTS]
    shared = {re.sub(r"^train_recipe .*", "", text, flags=re.M) for text in commands}
    assert len(shared) == 1
    assert "SMOE_ROOT" in shared.pop()


def test_not_in_a_job() -> None:
    assert_refused(bash("check_job"), "no Slurm job", "sbatch", "local_slurm.sh")


def test_started_by_hand() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SMOE_"))}
    done = subprocess.run(["bash", str(SCRIPTS[0])], env=environ, cwd="/", capture_output=True, text=True, timeout=60)
    assert_refused(done, "no Slurm job")


def test_a_task_for_each_gpu() -> None:
    done = bash("check_job; echo $TASKS $GPUS ${CUDA_VISIBLE_DEVICES-theirs}", **JOB, SLURM_GPUS_ON_NODE="4")
    assert done.stdout == "4 4 theirs\n"
    for tasks in ("2", "8"):
        refused = bash("check_job", **JOB, SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4")
        assert_refused(refused, f"{tasks} tasks and 4 GPUs a node", "--ntasks-per-node=4")


def test_gpus_that_were_not_asked_for_stay_untouched() -> None:
    done = bash("check_job; echo $TASKS $GPUS [$CUDA_VISIBLE_DEVICES]", **JOB, CUDA_VISIBLE_DEVICES="0,1")
    assert done.stdout == "4 0 []\n"


def test_gpus_that_torch_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/bash\ncase "$2" in *device_count*) echo 0 ;; esac\n')
    python.chmod(0o755)
    done = bash("check_job; use_environment", **JOB, SLURM_GPUS_ON_NODE="4", SMOE_ENV=str(tmp_path), SMOE_ROOT=str(ROOT))
    assert_refused(done, "4 GPUs a node", "sees 0", "--gpus-per-node=0")


def test_an_environment_that_lacks_packages(tmp_path: Path) -> None:
    script = tmp_path / "activate.sh"
    script.write_text(f'python() {{ echo "torch, h5py"; }}; PATH={tmp_path}:$PATH\n')
    done = bash("GPUS=0; use_environment", SMOE_ENV=str(script), SMOE_ROOT=str(ROOT))
    assert_refused(done, "lacks torch, h5py", "SMOE_ENV")


@pytest.mark.parametrize(
    ("status", "words"), [(75, "has stopped as asked; a requeued job goes on"), (3, "failed with status 3")]
)
def test_a_step_that_does_not_end_well_ends_the_job_with_a_line(status: int, words: str) -> None:
    done = bash(f"every_task() {{ return {status}; }}; step 'taking statistics' true; echo went on")
    assert done.returncode == status
    assert f"taking statistics {words}" in done.stdout + done.stderr
    assert "went on" not in done.stdout


def test_the_home_folder_in_variables(tmp_path: Path) -> None:
    """Nobody but a shell that sees them bare puts it in; a folder called ~ is never made."""
    (tmp_path / "data").mkdir()
    variables = {"SMOE_DATA": "~/data", "SMOE_RUNS": "~/runs #1", "HOME": str(tmp_path)}
    done = bash('choose_data a b; echo "$DATA:$RUNS:$SMOE_DATA"', **variables)
    assert done.stdout == f"{tmp_path}/data:{tmp_path}/runs #1:{tmp_path}/data\n", done.stderr
    assert bash("echo $SMOE_DATA", SMOE_DATA="~root/data").stdout == f"{Path('~root').expanduser()}/data\n"
    assert bash("echo $SMOE_DATA", SMOE_DATA="./~/data").stdout == "./~/data\n"
    assert_refused(bash("echo $SMOE_RUNS", SMOE_RUNS="~no_such_user/x"), "SMOE_RUNS=~no_such_user/x", "no home folder")
    assert_refused(bash("echo", SMOE_DATA="~$(touch here)/x"), "no home folder")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_home_folder_in_smoe_root(path: Path, tmp_path: Path) -> None:
    (tmp_path / "checkout").symlink_to(ROOT)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SMOE_"))}
    environ |= {"SMOE_ROOT": "~/checkout", "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": "/"}
    copy = tmp_path / "job"
    copy.write_text(path.read_text())
    done = subprocess.run(["bash", str(copy)], env=environ, cwd="/", capture_output=True, text=True, timeout=60)
    assert_refused(done, "no Slurm job")


def test_missing_data_are_named_with_what_can_be_done(tmp_path: Path) -> None:
    done = bash("choose_data a b", SMOE_DATA=str(tmp_path / "none"), SMOE_RUNS=str(tmp_path))
    assert_refused(done, "no data at", "SMOE_SYNTHETIC=1", "docs/weather.md")
    assert "convert" not in done.stderr, "ERA5 of several levels cannot be converted"


def test_every_step_takes_the_environment_along() -> None:
    """Whatever sbatch was told to export: else no task finds python (with a real Slurm: tests/slurm)."""
    calls = re.findall(r"^ *srun (.*)$", (ROOT / "slurm" / "common.sh").read_text(), re.M)
    assert calls
    assert all(call.startswith("--export=ALL ") for call in calls)


def test_runs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bash("choose_data a b", SMOE_SYNTHETIC="1", SMOE_RUNS=str(tmp_path / "file" / "runs"))
    assert_refused(done, "cannot write in", "SMOE_RUNS")
