"""Pictures of a run: that they are there, show the right figures, and say what is wrong where they cannot be drawn."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smoe_hpc.config import Data, Gate, Model, Recipe, Splits, to_yaml
from smoe_hpc.errors import CheckpointError, RunError, SmoeError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.io.synthetic.heat import make_heat
from smoe_hpc.report import curves, draw_pictures, make_pictures, routing, style
from smoe_hpc.report.pictures import selections
from smoe_hpc.runs.metrics import read_events
from smoe_hpc.scores import best_matching, confusion_matrix
from smoe_hpc.tasks import make_task

GRID = (8, 10)


@pytest.fixture(scope="module")
def heat(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heat")
    make_heat(path, runs=(2, 1, 1), grid=GRID, steps=4)
    return path


@pytest.fixture(scope="module")
def regional(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("regional") / "store.h5"
    grid = Grid("latlon", np.arange(50, 56.0), 350 + np.arange(8.0))
    times = np.datetime64("2019-03-01T00") + np.arange(4 * 9) * np.timedelta64(6, "h")
    fields = 280 + np.random.default_rng(0).standard_normal((len(times), 1, *grid.shape)).astype(np.float32)
    with StoreWriter(file, grid, ["t2m"], ["K"], coords={"time": times}) as writer:
        writer.write(0, fields)
    return file


def heat_recipe(heat: Path, model: Model | None = None) -> Recipe:
    return Recipe(name="some_run", task="heat", data=Data(store=str(heat)), model=model or Model())


def regional_recipe(store: Path, model: Model) -> Recipe:
    splits = Splits(train="2019-03-01/2019-03-04", validation="2019-03-05/2019-03-06", test="2019-03-07/2019-03-09")
    data = Data(store=str(store), inputs=[-6, 0], lead=6, splits=splits, normalize=True)
    return Recipe(name="uk", task="regional", data=data, model=model)


def metrics(routed: bool) -> str:
    lines: list[dict] = []
    for step in range(1, 201):
        lines.append({"event": "step", "step": step, "epoch": 0, "loss": 1 / step})
        if routed:
            lines[-1]["selections_changed"] = 0.1 / step
        if step % 50 == 0:
            scores = {"all": {"within_1pct": step / 2.0, "rmse": 1.0, "loss": 1 / step, "persistence_rmse": 2.0}}
            scores["region_0"] = {"within_1pct": step / 3.0}
            lines.append({"event": "validation", "step": step, "epoch": 0, "split": "validation", "scores": scores})
    return "".join(json.dumps(line) + "\n" for line in lines)


def finished_run(path: Path, recipe: Recipe) -> Path:
    """A run directory as training leaves it."""
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(recipe))
    (path / "metrics.jsonl").write_text(metrics(recipe.model.kind == "smoe"))
    model = make_task(recipe).build_model()
    shared: set[int] = set()  # a tensor of several names is written once
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in shared:
            state[name] = tensor.contiguous()
            shared.add(tensor.data_ptr())
    save_file(state, path / "weights.safetensors")
    return path


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Model(), {"curves", "routing_0", "filters", "forecast"}),
        (Model(num_experts=5, gate=Gate(kind="conv")), {"curves", "routing_0", "filters", "forecast"}),
        (Model(kind="conv", channels=[4, 1]), {"curves", "filters", "forecast"}),
        (Model(kind="lcn"), {"curves", "forecast"}),
        (
            Model(channels=[2, 2, 1], num_experts=4, gate=Gate(share=True), head="conv1x1"),
            {"curves", "routing_0", "routing_1", "filters", "forecast"},
        ),
    ],
)
def test_pictures_of_heat_runs(heat: Path, tmp_path: Path, model: Model, names: set[str]):
    drawn = make_pictures(finished_run(tmp_path / "run", heat_recipe(heat, model)))
    assert {path.stem for path in drawn} == names
    assert all(is_png(path) and path.parent == tmp_path / "run" / "pictures" for path in drawn)
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} == {f"{name}.png" for name in names}


def test_pictures_of_real_data_have_no_true_regions(regional: Path, tmp_path: Path):
    model = Model(num_experts=4, residual=True)
    drawn = make_pictures(finished_run(tmp_path / "run", regional_recipe(regional, model)))
    assert {path.stem for path in drawn} == {"curves", "routing_0", "filters", "forecast"}
    assert all(map(is_png, drawn))


def test_the_most_used_of_many_experts_are_shown():
    indices = np.stack([np.full((2, 3), 49), np.arange(6).reshape(2, 3)])
    made = routing.draw_experts(indices, Grid.plane(2, 3), 50, "t")
    shown = [axes.get_title() for axes in made.axes if axes.get_visible()]
    assert len(shown) == routing.MOST_EXPERTS
    assert shown[0] == "expert 0: 17 %"
    assert shown[-1] == "expert 49: 100 %"


def test_a_run_that_still_trains_has_only_curves(heat: Path, tmp_path: Path):
    run = finished_run(tmp_path / "run", heat_recipe(heat))
    (run / "weights.safetensors").unlink()
    assert [path.stem for path in make_pictures(run)] == ["curves"]
    (run / "metrics.jsonl").unlink()
    assert make_pictures(run) == []


def test_drawing_leaves_the_model_as_it_was(heat: Path, tmp_path: Path):
    task = make_task(heat_recipe(heat))
    model = task.build_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draw_pictures(task, tmp_path, model)  # as at the end of training
    assert (tmp_path / "pictures" / "forecast.png").exists()
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_of_another_model(heat: Path, tmp_path: Path):
    run = finished_run(tmp_path / "run", heat_recipe(heat))
    (run / "config.yaml").write_text(to_yaml(heat_recipe(heat, Model(num_experts=4))))
    with pytest.raises(CheckpointError, match="does not fit the recipe"):
        make_pictures(run)
    (run / "config.yaml").write_text(to_yaml(heat_recipe(heat, Model(kind="conv", channels=[2, 1]))))
    with pytest.raises(CheckpointError):
        make_pictures(run)
    (run / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="does not fit"):
        make_pictures(run)
    with pytest.raises(RunError, match="not a run"):
        make_pictures(tmp_path / "nothing")


def test_metrics_that_are_being_written(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(metrics(True) + '{"event": "step", "st')
    events = read_events(file)
    assert len(events["step"]) == 200
    assert len(events["validation"]) == 4
    file.write_text("what\n")
    with pytest.raises(RunError, match="cannot be read as metrics"):
        read_events(file)
    assert curves.draw_curves({"step": [], "epoch": [], "validation": []}, "rmse", "K", "t") is None


def test_curves_bear_missing_figures():
    events = {
        "step": [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}],
        "validation": [{"step": 2, "scores": {"all": {"within_1pct": None}}}],
    }
    assert curves.draw_curves(events, "within_1pct", "", "t") is not None


def test_smoothing_keeps_the_mean_and_the_last_step():
    steps, values = np.arange(1, 1001.0), np.arange(1000.0)
    at, means = curves.smoothed(steps, values, bins=10)
    assert len(at) == 10
    assert at[-1] == 1000
    assert means.mean() == pytest.approx(values.mean())
    assert curves.smoothed(steps[:5], values[:5])[1].tolist() == [0, 1, 2, 3, 4]


def test_learned_routing_wears_the_colours_of_the_regions():
    region = np.array([[0, 0, 1], [2, 1, 1]])
    experts = np.array([3, 0, 2])[region]  # expert 1 of 4 is not used
    made = routing.draw_routing_beside_regions(experts, region, Grid.plane(2, 3), 4, "t")
    true, learned, wrong = (axes.images[0].get_array() for axes in made.axes[:3])
    assert np.array_equal(true, learned)
    assert not np.any(wrong)
    assert "100.00 % agree" in made.axes[2].get_title()


def test_selections_are_those_of_the_sample(heat: Path):
    task = make_task(heat_recipe(heat, Model(channels=[2, 1], gate=Gate(kind="conv"))))
    model = task.build_model().eval()
    with torch.no_grad():
        found = selections(model, torch.rand(1, 1, *GRID))
    assert [indices.shape for _, indices in found] == [(2, *GRID), (1, *GRID)]


def test_true_stencils_come_from_the_constants():
    region, diffusivity = np.array([[1, 0]]), np.array([[0.25, 0.0025]])
    stencils = routing.true_stencils(diffusivity, region)
    assert stencils[0, 1, 1] == pytest.approx(0.99)
    assert stencils[1].tolist() == [[0, 0.25, 0], [0.25, 0, 0.25], [0, 0.25, 0]]
    matching = best_matching(confusion_matrix(region[0:1], region, 2))
    made = routing.draw_stencils(stencils, stencils, matching, "t")
    assert "at most 0.0e+00" in made.axes[2].get_title()


def test_north_is_up_and_the_region_lies_west_of_greenwich():
    grid = Grid("latlon", np.array([50.0, 51.0]), np.array([350.0, 351.0, 352.0]))
    made = style.figure(3, 3)
    axes = made.subplots()
    image = style.show_map(axes, np.zeros(grid.shape), grid, "t")
    assert image.get_extent() == [-10.5, -7.5, 49.5, 51.5]
    assert image.origin == "lower"


def test_nothing_half_written_is_left(tmp_path: Path):
    made = style.figure(2, 2)
    made.subplots()
    path = style.save(made, tmp_path / "new" / "a.png")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


DAMAGED = {
    "deep": ("[" * 100_000, "maximum recursion|too deep|recursion"),
    "no scores": ('{"event":"validation","step":7,"epoch":1,"split":"validation"}', "line 2: it has no scores"),
    "no numbers": ('{"event":"step","step":"a","loss":"b"}', "line 2: a step or a figure is no number"),
    "no event": ('{"event":[1]}', "line 2: it is no event of a run"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_metrics_are_one_error(tmp_path: Path, damage: str):
    line, message = DAMAGED[damage]
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"step","step":1,"loss":1.0}\n' + line + "\n")
    with pytest.raises(RunError, match=message):
        read_events(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, heat: Path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match="is a FIFO, not a regular file"):
        read_events(tmp_path / "metrics.jsonl")
    (tmp_path / "config.yaml").write_text(to_yaml(heat_recipe(heat)))
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(SmoeError, match=r"weights\.safetensors is a FIFO, not a regular file"):
        make_pictures(tmp_path)
