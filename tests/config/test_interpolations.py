"""What ``${...}`` in a recipe stands for, and what it is not to reach."""

from pathlib import Path

import pytest

from smoe_hpc.config import load_recipe
from smoe_hpc.errors import ConfigError


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:API_TOKEN}",
        "a_${oc.env:API_TOKEN}_b",
        "${oc.env:API_TOKEN,none}",
        "${ oc.env : API_TOKEN }",
        "${oc.env:SCRATCH,${oc.env:API_TOKEN}}",
        "${oc.env:${task}}",
        "${oc.${task}:API_TOKEN}",
        "${oc.decode:'${oc.env:API_TOKEN}'}",
        "${oc.create:{a:1}}",
        "${oc.select:name,x}",
    ],
)
def test_a_secret_of_the_environment_stays_there(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("API_TOKEN", "s3cret")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'name: n\ntask: heat\ndata: {{store: "{value}"}}\n')
    inside = tmp_path / "list.yaml"
    inside.write_text(f'name: n\ntask: weather\ndata: {{store: d, variables: ["{value}"]}}\n')
    for path, key in ((recipe, "data.store"), (inside, "data.variables")):
        with pytest.raises(ConfigError, match=f"^{key}.*write the value out") as caught:
            load_recipe(path)
        assert "s3cret" not in str(caught.value)


def test_the_remedy_is_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "s3cret")
    with pytest.raises(ConfigError, match=r"name: the variable API_TOKEN is not looked up.*or set a variable SMOE_\.\.\."):
        load_recipe("heat_smoe", ["name=${oc.env:API_TOKEN}"])


def test_what_says_where_and_who_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SMOE_DATA", "/project/d"), ("USER", "me"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SCRATCH", raising=False)
    changes = ["data.store=${oc.env:SMOE_DATA}/heat", "name=${oc.env:USER}_${oc.env:SLURM_JOB_ID}_${task}"]
    recipe = load_recipe("heat_smoe", [*changes, "run.root=${oc.env:SCRATCH,/tmp/me}"])
    assert (recipe.data.store, recipe.name, recipe.run.root) == ("/project/d/heat", "me_7_heat", "/tmp/me")
