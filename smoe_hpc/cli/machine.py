"""Verbs for a first look: quickstart, recipes, doctor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from smoe_hpc.cli.output import JsonFile, say, show, write_json


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs"),
    data: Annotated[Path, typer.Option(help="Folder for the heat data; written if missing.")] = Path("data/heat"),
    json_file: JsonFile = None,
) -> None:
    """Train an SMoE layer and a small CNN on heat diffusion; print a table, draw pictures (minutes on two cores)."""
    from smoe_hpc.tasks.quickstart import run

    run(out, data, json=json_file)


def recipes(json_file: JsonFile = None) -> None:
    """List the experiments that come with the package."""
    from smoe_hpc.config import recipe_names, recipe_summary

    summaries = {name: recipe_summary(name) for name in recipe_names()}
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        say(f"{name:{width}}  {summary}")
    write_json(json_file, summaries)


def doctor(json_file: JsonFile = None) -> None:
    """Say what this machine has (GPUs, NCCL, MPI, Slurm, compiler), what will be used, and why."""
    from smoe_hpc.launch import doctor as machine

    found = machine.inspect_machine()
    show(machine.render(found))
    write_json(json_file, [asdict(finding) for finding in found])
