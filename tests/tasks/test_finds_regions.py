"""The promise of the README: the quickstart's recipe finds the hidden regions, to the last point."""

import json
from pathlib import Path

import pytest

from smoe_hpc.config import load_recipe
from smoe_hpc.io.synthetic.heat import make_heat
from smoe_hpc.tasks import make_task
from smoe_hpc.training import train


@pytest.mark.slow
def test_the_quickstart_reaches_100_percent_in_every_region(tmp_path: Path):
    make_heat(tmp_path / "heat", runs=(100, 4, 4))  # a tenth of the runs, seen ten times as often
    recipe = load_recipe("heat_quickstart", [f"data.store={tmp_path / 'heat'}", "run.pictures=false"])
    scores = train(recipe, make_task(recipe), run_dir=tmp_path / "run", progress=False)
    regions = ("all", "region_0", "region_1", "region_2")
    assert {split: [scores[split][region]["within_1pct"] for region in regions] for split in scores} == {
        "validation": [100.0] * 4,
        "test": [100.0] * 4,
    }
    assert scores["test"]["all"]["routing_agreement"] == 100.0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) <= 21_875
