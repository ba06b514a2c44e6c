"""Every snippet of the README and of the pages runs as it is written, on little data and for few steps.

A page's snippets run in its own folder, in the order of the page, as a reader would do it. Commands go through a ``smoe-hpc``
that shortens training and makes small data; nothing else is changed.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(
    r"^    (?:smoe-hpc|[A-Z_]+=\S+ (?:sbatch|smoe-hpc)|python|torchrun|mpirun|sbatch|bash|source) .*$", re.MULTILINE
)
# What is not run here, by what stands in it, and why.
ELSEWHERE = {
    "sbatch": "tests/slurm runs the scripts by a Slurm of its own",
    "local_slurm.sh": "tests/slurm",
    "nodes=2": "tests/slurm submits to several nodes",
    "--nodes 2": "tests/slurm submits to several nodes",
    "bash launch/": "the scripts that run this test",
    "source .venv": "made by the scripts",
    "kernels build --arch": "tests/kernels builds; needs nvcc",
    "experiments.routing": "the study of a GPU; tests/experiments has it small",
    "| cli": "a picture, held by tests/test_architecture.py",
}
SHIM = """#!/bin/bash
case "$1 $2" in
    "data heat") set -- "$@" --runs 6 2 2 --grid 12 12 --steps 10 ;;
    "train "*) set -- "$@" training.max_steps=4 training.batch=8 run.pictures=false ;;
    "compare "*) set -- "$@" training.batch=8 run.pictures=false; set -- "${@/2000/4}" ;;
esac
exec PYTHON -m smoe_hpc "$@"
"""


def snippets(page: Path) -> list[tuple[str, str]]:
    """(language, text) in the order of the page; commands set off by indentation are bash, one each."""
    text = page.read_text(encoding="utf-8")
    found = [(match.start(), match.group(1) or "bash", match.group(2)) for match in FENCED.finditer(text)]
    fenced = [range(*match.span()) for match in FENCED.finditer(text)]
    found += [
        (match.start(), "bash", match.group().strip() + "\n")
        for match in INDENTED.finditer(text)
        if not any(match.start() in part for part in fenced)
    ]
    return [(language, snippet) for _, language, snippet in sorted(found)]


def elsewhere(snippet: str) -> bool:
    return any(words in snippet for words in ELSEWHERE)


WITH_SNIPPETS = [page for page in PAGES if any(not elsewhere(text) for _, text in snippets(page))]


def test_nothing_is_left_out_without_need():
    """Each reason to leave out a snippet is used, and most snippets run."""
    every = [text for page in PAGES for _, text in snippets(page)]
    assert [words for words in ELSEWHERE if not any(words in text for text in every)] == []
    assert sum(not elsewhere(text) for text in every) > len(every) / 2


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: data of the reader's own, and the command."""
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin/smoe-hpc"
    shim.write_text(SHIM.replace("PYTHON", sys.executable))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def given(page: Path, folder: Path) -> None:
    """The files that a page's reader has already."""
    if page.name in ("README.md", "regional.md"):
        from ..io.convert.grib_files import write_grib

        for name in ("FILE.grib", "era5-2mt-2019-03-uk.grib"):
            write_grib(folder / name, list(range(31 * 24)))
    if page.name in ("README.md", "heat.md"):
        run("smoe-hpc data heat data/heat\n")
    if page.name == "weather.md":
        import xarray

        times = np.datetime64("2019-03-01T00", "ns") + np.arange(3) * np.timedelta64(1, "h")
        coords = {"valid_time": times, "latitude": [53.0, 52.5, 52.0], "longitude": [-1.0, -0.5, 0.0, 0.5]}
        values = 280 + np.arange(36, dtype="float32").reshape(3, 3, 4)
        xarray.Dataset({"t2m": (tuple(coords), values)}, coords).to_netcdf(folder / "t2m.nc", engine="h5netcdf")
        (folder / "data/mine").mkdir()


def run(command: str, before: str = "") -> None:
    """A piece of bash; ``before`` ran earlier, and its variables hold."""
    kept = "".join(line for line in before.splitlines(keepends=True) if re.match(r"changes=|  (model|training)\.", line))
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", kept + command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_snippets_run_in_order(page: Path, reader: Path):
    given(page, reader)
    bash = ""
    for language, text in snippets(page):
        if elsewhere(text):
            continue
        if language == "python":
            exec(compile(text, page.name, "exec"), {})
        else:
            assert language == "bash", f"{page.name}: a snippet in {language}"
            run(text.replace("for seed in 0 1 2", "for seed in 0"), bash)
            bash += text
