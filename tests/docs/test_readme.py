"""What the README shows is run here."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    smoe-hpc ")]


def test_the_layer_in_ten_lines_trains():
    example, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names["model"].parameters())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command: str):
    from smoe_hpc.cli import app

    words = shlex.split(command)[1:]
    verb = words[:2] if words[0] in ("data", "bench") else words[:1]
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0, result.output
    for option in (word for word in words if word.startswith("--")):
        assert option in result.output


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.split()[1] in ("train", "compare", "submit")])
def test_every_recipe_takes_its_changes(command: str):
    from smoe_hpc.cli import app
    from smoe_hpc.config import check_world, load_recipe

    verb, *arguments = shlex.split(command)[1:]
    given = get_command(app).commands[verb].make_context(verb, arguments).params  # type: ignore[attr-defined]
    words = given["arguments"] if verb == "compare" else [given["recipe"], *(given["overrides"] or [])]
    recipes, changes = ([word for word in words if ("=" in word) == change] for change in (False, True))
    assert recipes
    world = given["nodes"] * max(given["gpus_per_node"], 1) if verb == "submit" else 1
    for recipe in recipes:
        check_world(load_recipe(recipe, changes), world)


def test_every_extra_is_explained():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", README, re.MULTILINE))
    assert set(setup["options.extras_require"]) <= set(rows)
    assert "cfgrib" in rows["convert"]


def test_what_tensorboard_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from smoe_hpc.cli import app

    monkeypatch.chdir(tmp_path)
    small = ["--runs", "2", "1", "1", "--grid", "8", "8", "--steps", "10"]
    assert CliRunner().invoke(app, ["data", "heat", "data/heat", *small]).exit_code == 0
    short = ["training.batch=8", "training.max_steps=2", "run.tensorboard=true", "run.pictures=false"]
    result = CliRunner().invoke(app, ["train", "heat_smoe", *short])
    assert result.exit_code == 0, result.output
    shown = EventAccumulator(str(tmp_path / "runs/heat_smoe/tensorboard")).Reload().Tags()["scalars"]
    wanted = {"step/loss", "step/selections_changed", "step/load_max", "validation/scores/region_0/within_1pct"}
    assert wanted | {"validation/best/value", "validation/best/step"} <= set(shown)
    assert any(name.startswith("step/lr/") for name in shown)
    for place in ("`step/`", "`epoch/loss`", "`validation/scores/`", "`validation/best/`", "tensorboard --logdir runs"):
        assert place in README


@pytest.mark.parametrize(("name", "ignored"), [("smoe_1p4deg-17.out", True), ("slurm-3.out", True), ("docs/layout.out", False)])
def test_what_slurm_leaves_is_ignored(name: str, ignored: bool):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git, or no checkout")
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == (0 if ignored else 1)


def test_a_store_from_netcdf_as_the_page_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    page = (ROOT / "docs" / "weather.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "t2m.nc" in code)
    monkeypatch.chdir(tmp_path)
    times = np.datetime64("2019-03-01T00", "ns") + np.arange(3) * np.timedelta64(1, "h")
    north_first, through_greenwich = [53.0, 52.5, 52.0], [-1.0, -0.5, 0.0, 0.5]
    values = 280 + np.arange(36, dtype="float32").reshape(3, 3, 4)
    coords = {"valid_time": times, "latitude": north_first, "longitude": through_greenwich}
    xarray.Dataset({"t2m": (tuple(coords), values)}, coords).to_netcdf("t2m.nc", engine="h5netcdf")
    Path("data").mkdir()
    exec(compile(example, "weather.md", "exec"), {})
    from smoe_hpc.io import Store

    store = Store("data/t2m.h5")
    assert store.grid.describe() == "3 x 4 latlon, lat 52..53, lon 359..360.5, regional"
    assert (store.coords["time"] == times).all()
    np.testing.assert_array_equal(store.read(range(3))[:, 0], values[:, ::-1])


def test_every_recipe_named_is_there():
    from smoe_hpc.config import recipe_names

    named = set(re.findall(r"\b(?:heat|uk|weather)_[a-z0-9_]+\b(?!\.h5)", " ".join(COMMANDS)))
    assert any(name.startswith("weather_") for name in named)
    assert named <= set(recipe_names())


def test_every_file_linked_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", ["bash launch/quickstart.sh", "bash launch/test.sh", "sbatch slurm/smoe_1p4deg.sh"])
def test_scripts_are_there(command: str):
    assert command in README
    assert (ROOT / command.split()[1]).exists()


def test_every_script_named_is_there():
    scripts = re.findall(r"\b(?:launch|slurm)/\w+\.sh\b", README)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_what_the_pages_name_is_there(page: Path):
    from smoe_hpc.cli import app
    from smoe_hpc.config import recipe_names

    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    group = get_command(app)
    for verb, second in re.findall(r"smoe-hpc ([a-z]+)(?: ([a-z]+))?", text):
        assert verb in group.commands  # type: ignore[attr-defined]
        if verb in ("data", "bench"):
            assert second in group.commands[verb].commands  # type: ignore[attr-defined]
    trained = re.findall(r"smoe-hpc (?:train|submit|data statistics) ([a-z0-9_]+)(?=[\s`])", text)
    assert set(trained) <= set(recipe_names())
