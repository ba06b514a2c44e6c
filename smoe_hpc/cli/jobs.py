"""Verbs for jobs and where runs stand: submit, status."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from smoe_hpc.cli.output import JsonFile, figure, say, show_scores, show_table, write_json
from smoe_hpc.cli.runs import Overrides, RecipeName
from smoe_hpc.errors import ConfigError, RunError

_TAIL = 1 << 16  # bytes: the newest events of metrics.jsonl are in its last lines
_HEADINGS = ("run", "state", "step", "score", "job")


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node, a process each; 0 trains on CPUs.")] = 0,
    tasks_per_node: Annotated[int | None, typer.Option(help="Processes of each node; one for each GPU if not given.")] = None,
    cpus_per_task: Annotated[int, typer.Option(help="Cores of each process (slurm).")] = 1,
    cluster: Annotated[str, typer.Option(help="slurm, or local: processes of this machine.")] = "slurm",
    time: Annotated[int, typer.Option(help="Minutes until it has to stop; on Slurm it is then requeued.")] = 24 * 60,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="One more option of sbatch.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and print the scores.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a recipe as a Slurm job, or as processes of this machine in the background."""
    from smoe_hpc.launch import submit as submit_job

    more = dict(_pair(option, "--sbatch") for option in sbatch or ())
    job = submit_job(
        recipe,
        dict(_pair(override, "an override") for override in overrides or ()),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        cluster=cluster,
        time=time,
        partition=partition,
        account=account,
        sbatch=more,
    )
    out, errors = job.logs()
    say(f"job {job.id} ({cluster}): {job.run_dir}; it prints to {out}, errors to {errors}")
    said: dict[str, Any] = {"job": job.id, "run": str(job.run_dir), "logs": [str(out), str(errors)]}
    if wait or cluster == "debug":
        said["scores"] = job.result()
        show_scores(said["scores"])
    write_json(json_file, said)


def status(
    root: Annotated[Path, typer.Argument(metavar="[RUNS]", help="Folder of runs.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Say where the runs of a folder stand: state, step, last score, Slurm job."""
    if not root.is_dir():
        raise RunError(f"{root} is no folder of runs; name one, e.g. smoe-hpc status runs")
    folders = {path.parent for name in ("lock", "jobs") for path in root.glob(f"*/{name}")}
    rows = [_row(folder) for folder in sorted(folders)]
    if not rows:
        say(f"{root}: no runs")
    else:
        show_table(str(root), _HEADINGS, [[row[name] for name in _HEADINGS] for row in rows])
    write_json(json_file, rows)


def _pair(text: str, what: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r}: {what} is key=value")
    return key, value


def _row(folder: Path) -> dict[str, str]:
    """A run as plain texts: its state beside where it is and what it reached.

    The state is "running", "queued", "starting" (its job runs, and has not come to training), "ended", "interrupted",
    "failed" (it ended before it began to train), or "submitted": as processes of a machine that have said nothing yet.
    """
    from smoe_hpc.launch.job import job_state

    lock = folder / "lock"
    holder, held = _holder(lock) if lock.exists() else ("", False)
    begun = re.search(r"Slurm job (\S+)", holder)
    job = begun[1] if begun else None
    if not held:
        job = _submitted(folder / "jobs", lock) or job
    state = job_state(job) if job else None
    ended = (folder / "finished.json").exists()
    if held:
        now = "running"
    elif state in ("PENDING", "REQUEUED", "CONFIGURING"):
        now = "queued"
    elif ended:
        now = "ended"
    elif state == "RUNNING":
        now = "starting"
    elif lock.exists():
        now = "interrupted"
    else:
        now = "failed" if job or any((folder / "jobs").glob("*_result.pkl")) else "submitted"
    step, score = _newest(folder / "metrics.jsonl")
    return {
        "run": folder.name,
        "state": now,
        "step": step,
        "score": score,
        "job": f"{job} {state or 'unknown'}" if job else "-",
    }


def _submitted(jobs: Path, lock: Path) -> str | None:
    """The newest Slurm job that was submitted after the run's lock was last taken; None of none."""
    since = lock.stat().st_mtime if lock.exists() else 0.0
    scripts = [(path.stat().st_mtime, path.name) for path in jobs.glob("*_submission.sh")]
    newest = max((script for script in scripts if script[0] > since), default=None)
    return newest[1].removesuffix("_submission.sh") if newest else None


def _holder(lock: Path) -> tuple[str, bool]:
    """Who holds a run's lock, or held it last, and whether it is held."""
    with lock.open() as file:
        held = False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        return file.read(), held


def _newest(metrics: Path) -> tuple[str, str]:
    """Newest step that was written down, and the scores of the newest validation."""
    if not metrics.exists():
        return "-", "-"
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - _TAIL, 0))
        lines = file.read().decode(errors="replace").splitlines()
    step, score = "-", "-"
    for line in lines:
        event: dict[str, Any] = {}
        with contextlib.suppress(json.JSONDecodeError):  # the first line may be cut, the last half written
            event = json.loads(line)
        step = str(event.get("step", step))
        if event.get("event") == "validation":
            values = event["scores"].get("all", {})
            name = next((name for name in values if name != "loss"), None)
            score = "-" if name is None else f"{event['split']} {name} {figure(values[name])}"
    return step, score
