"""An ensemble of one-layer SMoEs against the layer itself."""

import json
from pathlib import Path

import pytest
import torch

from experiments.routing.__main__ import main
from experiments.routing.ensemble import Ensemble, Setting, patches_of
from experiments.routing.study import Case, Scope, routing_study, tables
from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, end_step, parameter_groups, routing_loss

GRID, N = (9, 7), 3


@pytest.mark.parametrize("error_scale", ["none", "running_mean"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_member_trains_as_the_layer_does(error_scale: str, damping: float):
    setting = Setting(0.4, gate_lr=0.05, lr=0.02, damping=damping, error_scale=error_scale, seed=3)
    other = Setting(0.6, gate_lr=0.01, seed=4)
    ensemble = Ensemble([other, setting], N, GRID)
    layer = SpatialMoE2d(1, N, 1, GRID, routing_loss=RoutingLoss(0.4, error_scale=error_scale), damping=Damping(damping))
    with torch.no_grad():
        layer.weight.copy_(ensemble.weights[1].view(N, 1, 1, 3, 3))
        layer.gate.logits.copy_(ensemble.logits[1].view(N, *GRID))
    optimizer = torch.optim.Adam(parameter_groups(layer, lr=setting.lr, gate_lr=setting.gate_lr))
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        x, target = torch.randn(2, 4, *GRID, generator=generator)
        optimizer.zero_grad()
        loss = (layer(x[:, None])[:, 0] - target).square().mean()
        (loss + routing_loss(layer)).backward()
        optimizer.step()
        end_step(layer, step)
        losses = ensemble.train_step(patches_of(x), target.flatten(1))
        assert losses[1].item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(ensemble.weights[1].flatten(), layer.weight.detach().flatten(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ensemble.logits[1].flatten(), layer.gate.logits.detach().flatten(), rtol=1e-3, atol=1e-3)


def test_agreement_matches_experts_to_regions():
    ensemble = Ensemble([Setting(0.4, 1e-3)], 2, (1, 4))
    ensemble.indices = torch.tensor([[1, 1, 0, 1]])
    assert ensemble.agreement(torch.tensor([0, 0, 1, 1])).tolist() == [0.75]


def test_the_study_gives_a_row_for_each_setting():
    cases = (Case(2, 0.3, 10.0), Case(3, 0.3, 1.0))
    quick = {"seeds": 1, "runs": 2, "epochs": 1, "grid": (16, 16)}
    scope = Scope(cases, quantiles=(0.9, 1.1), gate_lrs=(1e-2,), dampings=(0.05,), **quick)
    rows = routing_study(scope)
    assert [(r["num_experts"], round(r["relative_quantile"], 2), r["error_scale"]) for r in rows] == [
        (n, q, scale) for n in (2, 3) for q in (0.9, 1.1) for scale in ("none", "running_mean")
    ]
    assert all(100 / r["num_experts"] <= r["agreement"] <= 100 and r["steps"] == 6 for r in rows)
    made = tables(rows)
    assert [title for title, _, _ in made] == ["N/K = 2, noise 0.3, western half x10", "N/K = 3, noise 0.3, western half x1"]
    assert all(len(line) == len(columns) == 3 for _, columns, cells in made for line in cells)


def test_the_command_prints_a_table_for_each_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--device", "cpu", "--epochs", "1", "--runs", "1", "--seeds", "1", "--grid", "8", "8"]
    main([*small, "--json", str(tmp_path / "noisy.json")])
    printed = capsys.readouterr().out
    assert printed.count("### N/K = ") == 6
    assert sum(line.startswith("| --- |") for line in printed.splitlines()) == 6
    assert len(json.loads((tmp_path / "noisy.json").read_text())) == 6 * 8 * 2 * 2 * 2
