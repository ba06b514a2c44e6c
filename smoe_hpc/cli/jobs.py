"""Verbs for jobs and the state of runs: submit, status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoe_hpc.cli.arguments import Overrides, RecipeName, RunName
from smoe_hpc.cli.figures import JsonFile, write_json
from smoe_hpc.cli.output import figure, say, show_scores, show_table
from smoe_hpc.cli.paths import user_path
from smoe_hpc.errors import ConfigError, RunError

if TYPE_CHECKING:
    from smoe_hpc.runs import Standing

_HEADINGS = ("run", "state", "step", "score", "best", "job")


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    run_name: RunName = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node, with one process each; 0 trains on CPUs.")] = 0,
    tasks_per_node: Annotated[int | None, typer.Option(help="Processes of each node; by default one for each GPU.")] = None,
    cpus_per_task: Annotated[int, typer.Option(help="Cores of each process (slurm).")] = 1,
    cluster: Annotated[str, typer.Option(help="slurm, or local: processes of this machine.")] = "slurm",
    time: Annotated[int, typer.Option(help="Minutes after which the job is stopped; on Slurm it is then requeued.")] = 24 * 60,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A further option of sbatch.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and print the scores.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a recipe as a Slurm job, or as processes of this machine in the background."""
    from smoe_hpc.launch import submit as submit_job

    more = dict(_pair(option, "--sbatch") for option in sbatch or ())
    changes = dict(_pair(override, "an override") for override in overrides or ())
    if run_name is not None:
        changes["name"] = run_name
    job = submit_job(
        recipe,
        changes,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        cluster=cluster,  # type: ignore[arg-type]  # submit checks it
        time=time,
        partition=partition,
        account=account,
        sbatch=more,
    )
    out, errors = job.logs()
    say(f"job {job.id} ({cluster}): {job.run_dir}; progress and errors go to {errors}, the rest to {out}")
    said: dict[str, Any] = {"job": job.id, "run": str(job.run_dir), "logs": [str(out), str(errors)]}
    if wait or cluster == "debug":
        said["scores"] = job.result()
        show_scores(said["scores"])
    write_json(json_file, said)


def status(
    root: Annotated[Path, typer.Argument(parser=user_path, metavar="[RUNS]", help="Folder of runs.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Show the state of the runs in a folder: step, last and best score, Slurm job."""
    from smoe_hpc.launch.job import job_states
    from smoe_hpc.runs import standings

    if not root.is_dir():
        raise RunError(f"{root} is no folder of runs; name one, e.g. smoe-hpc status runs")
    try:
        rows = [_row(run) for run in standings(root, job_states)]
    except OSError as error:
        raise RunError(f"{root} cannot be read ({error.strerror}); name a folder of runs that you may read") from None
    if not rows:
        say(f"{root}: no runs")
    else:
        bad = [row for row in rows if row["state"].startswith("cannot be read")]
        short = [{**row, "state": "cannot be read"} if row in bad else row for row in rows]
        show_table(str(root), _HEADINGS, [[row[name] for name in _HEADINGS] for row in short])
        for row in bad:
            say(f"{row['run']}: {row['state']}")
    write_json(json_file, rows)


def _pair(text: str, what: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r}: {what} is key=value")
    return key, value


def _row(run: Standing) -> dict[str, str]:
    return {
        "run": run.run,
        "state": run.state,
        "step": "-" if run.step is None else str(run.step),
        "score": _score(run.last),
        "best": _score(run.best) + (f" (step {run.best_step})" if run.best_step is not None else ""),
        "job": f"{run.job} {run.job_state or 'unknown'}" if run.job else "-",
    }


def _score(score: tuple[str, str, float | None] | None) -> str:
    if score is None:
        return "-"
    split, name, value = score
    return f"{split} {name} {figure(value)}"
