"""quickstart, recipes and doctor."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.calling import SMALL_HEAT, command, replace_room

QUICKSTART = "smoe_hpc.jobs.quickstart"


def test_quickstart_passes_its_folders_and_changes(monkeypatch: pytest.MonkeyPatch):
    calls = []
    replace_room(monkeypatch, QUICKSTART, run=lambda *args, **more: calls.append((*args, more)))
    assert command("quickstart", "--out", "a", "--data", "b", "training.max_steps=5").exit_code == 0
    assert calls == [(Path("a"), Path("b"), {"overrides": ["training.max_steps=5"]})]


def test_quickstart_with_other_data_there_says_what_to_do():
    assert command("data", "heat", "mine", *SMALL_HEAT).exit_code == 0
    result = command("quickstart", "--data", "mine")
    assert result.exit_code == 2
    assert "name another folder, or replace it with `smoe-hpc data heat mine --overwrite`" in result.stderr


def test_recipes(tmp_path: Path):
    result = command("recipes", "--json", "list.json")
    assert result.exit_code == 0
    assert "heat_smoe " in result.stdout
    assert "the paper's own settings" in json.loads((tmp_path / "list.json").read_text())["heat_smoe"]


def test_doctor(tmp_path: Path):
    from smoe_hpc.launch import doctor

    found = [doctor.Finding("GPU", "absent", "none", "training runs on the CPU")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "inspect_machine", lambda: found)
        result = command("doctor", "--json", "machine.json")
    assert result.exit_code == 0
    assert "training runs on the CPU" in result.stdout
    assert json.loads((tmp_path / "machine.json").read_text())[0]["name"] == "GPU"


def test_quickstart_writes_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    @dataclass
    class Row:
        recipe: str

    replace_room(monkeypatch, QUICKSTART, run=lambda *_, **__: [Row("heat_quickstart")])
    assert command("quickstart", "--json", "rows.json").exit_code == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"recipe": "heat_quickstart"}]


def test_the_keys_of_a_recipe(tmp_path: Path):
    result = command("recipes", "uk_t2m_smoe", "optimizer.lr=0.5", "--json", "keys.json")
    assert result.exit_code == 0, result.output
    assert "\n  optimizer.lr=0.5  (default 0.001; a number)\n      learning rate of experts" in result.stdout
    assert "model.routing_loss=null: the loss that the gate learns from" in result.stdout
    told = json.loads((tmp_path / "keys.json").read_text())
    assert told["optimizer.lr"]["value"] == 0.5
    assert told["optimizer.lr"]["default"] == 0.001
    assert "value" not in told["model.routing_loss.quantile"]
    wrong = command("recipes", "uk_t2m_smo")
    assert wrong.exit_code == 2
    assert "did you mean uk_t2m_smoe?" in wrong.stderr
