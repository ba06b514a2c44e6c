"""Recipes side by side, and the quickstart on top of it, on data so small that training takes seconds."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from smoe_hpc.errors import ConfigError
from smoe_hpc.io.synthetic import heat
from smoe_hpc.jobs import quickstart
from smoe_hpc.jobs.compare import Row, as_json, as_table, compare, so_far
from smoe_hpc.runs.directory import RunDirectory

SHORT = ["training.max_steps=6", "training.validate_every=3", "training.batch=8", "training.threads=1"]


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_the_quickstart_from_nothing_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def small(directory: Path) -> None:
        heat.make_heat(directory, runs=(2, 1, 1), grid=(8, 10), steps=20)

    monkeypatch.setattr(quickstart, "make_heat", small)
    console = Console(file=io.StringIO(), width=200)
    arguments = {"overrides": SHORT, "console": console}
    rows = quickstart.run(tmp_path / "runs", tmp_path / "heat", **arguments)
    assert [row.recipe for row in rows] == ["heat_quickstart", "quickstart_conv"]
    assert all(row.steps == 6 and row.seconds > 0 for row in rows)
    assert set(rows[0].scores) == {"all", "region_0", "region_1", "region_2"}
    assert 0 <= rows[0].scores["all"]["routing_agreement"] <= 100
    told = console.file.getvalue()
    assert f"pictures of heat_quickstart: {tmp_path / 'runs' / 'heat_quickstart' / 'pictures'}" in told
    assert (tmp_path / "runs" / "heat_quickstart" / "pictures" / "routing_0.png").exists()
    again = quickstart.run(tmp_path / "runs", tmp_path / "heat", **arguments)
    assert again == rows  # what has ended is shown, not trained again


def test_the_table_shows_every_region_and_what_is_missing():
    scores = {"all": {"within_1pct": 99.9996, "routing_agreement": 98.5}, "region_0": {"within_1pct": 50.0}}
    rows = [
        Row("smoe", 12315, 600, 20.14, scores, "runs/smoe"),
        Row("conv", 72, 600, 27.2, {"all": {"within_1pct": 55.2}}, "runs/conv"),
    ]
    table = shown(as_table(rows, "within_1pct", "heading"))
    for part in ("heading", "12,315", "20.1", "100.000", "region 0", "50.000", "routing agreement", "98.500", "-"):
        assert part in table
    assert "routing agreement" not in shown(as_table(rows[1:], "within_1pct", "heading"))
    assert json.loads(as_json(rows))[0]["parameters"] == 12315


def test_the_table_says_why_recipes_ended_where_not_all_did_alike():
    scores = {"all": {"within_1pct": 1.0}}
    rows = [Row(name, 1, 50, 1.0, scores, "runs/x", ended) for name, ended in (("a", "max_steps"), ("b", "early_stop"))]
    assert "early_stop" in shown(as_table(rows, "within_1pct", "heading"))
    assert "max_steps" not in shown(as_table(rows[:1], "within_1pct", "heading"))


def test_seconds_are_those_of_all_stretches(tmp_path: Path):
    lines = [{"step": 1, "seconds": 2.5}, {"step": 1, "validation_seconds": 9.0}, {"step": 2, "seconds": 0.5}]
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert so_far(RunDirectory(tmp_path)) == (2, 3.0)
    (tmp_path / "timing.jsonl").write_text('{"step": 1, "seconds": 2.5}\n{"step": 2, "sec')
    assert so_far(RunDirectory(tmp_path)) == (1, 2.5), "half a line, where it was killed"
    assert so_far(RunDirectory(tmp_path / "none")) == (None, 0.0)


def test_a_budget_of_time_shows_the_steps_made_and_the_time_of_all_calls(tmp_path: Path):
    """What a budget bought depends on the machine, and a run that is taken up again has had more than one."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    assert so_far(run) == (None, 0.0)
    lines = ['{"step": 40, "seconds": 2.5}', '{"step": 40, "validation_seconds": 1}', '{"step": 1200, "seconds": 3.5}', '{"st']
    run.timing.write_text("\n".join(lines))
    assert so_far(run) == (1200, 6.0)
    row = Row("heat_smoe", None, 1200, 6.0, {"all": {"rmse": 1.5}}, "runs/heat_smoe", "budget spent", spent=4.2)
    table = shown(as_table([row], "rmse", "heading"))
    assert "parameters" not in table
    for part in ("heat_smoe", "1,200", "4.2", "training in all", "6.0", "1.500", "ended", "budget spent"):
        assert part in table


def test_small_figures_are_not_rounded_away():
    rows = [Row("a", 1, 1, 1.0, {"all": {"loss": 0.000123456}}, "runs/a")]
    assert "0.000123" in shown(as_table(rows, "loss", "heading"))


def test_an_unknown_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quickstart, "make_heat", lambda directory: None)
    with pytest.raises(ConfigError, match="heat_quickstart"):
        quickstart.run(tmp_path, tmp_path, recipes=["heat_quickstrat"])


def test_no_recipe_trains_before_all_are_read(tmp_path: Path):
    """A name that is mistyped is found at once, not after hours of the recipes before it."""
    heat.make_heat(tmp_path / "heat", runs=(2, 1, 1), grid=(8, 10), steps=20)
    overrides = [f"data.store={tmp_path / 'heat'}", f"run.root={tmp_path / 'runs'}", *SHORT]
    with pytest.raises(ConfigError, match="heat_lcn"):
        compare(["heat_quickstart", "heat_lnc"], overrides)
    assert not (tmp_path / "runs").exists()
