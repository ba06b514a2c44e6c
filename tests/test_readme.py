"""What the README shows is run here."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    smoe-hpc ")]


def test_the_layer_in_ten_lines_trains():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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


def test_every_recipe_named_is_there():
    from smoe_hpc.config import recipe_names

    named = set(re.findall(r"\b(?:heat|uk|weather)_[a-z0-9_]+\b", " ".join(COMMANDS)))
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
