"""Anomaly correlation against loops, and what it must be for forecasts that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.scores import AnomalyCorrelation

GRID = (4, 5)
WEIGHTS = np.repeat(np.array([0.5, 1.5, 1.5, 0.5])[:, None], GRID[1], axis=1)


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(6, 2, *GRID, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(forecast: torch.Tensor, truth: torch.Tensor, usual: torch.Tensor, cut: int = 6) -> dict[str, float]:
    acc = AnomalyCorrelation(["z500", "t850"], WEIGHTS)
    valid = torch.tensor([True, True, False, True, True, True])
    for first in range(0, 6, cut):
        part = slice(first, first + cut)
        acc.update(forecast[part], truth[part], usual[part], valid[part])
    return acc.result()["all"]


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_it_equals_a_slow_form(cut: int):
    forecast, truth, usual = drawn(0), drawn(1), drawn(2)
    found = score(forecast, truth, usual, cut)
    for channel, name in enumerate(("z500", "t850")):
        each = []
        for sample in (0, 1, 3, 4, 5):
            both = ours = theirs = 0.0
            for row in range(GRID[0]):
                for column in range(GRID[1]):
                    place = (sample, channel, row, column)
                    f, t = float(forecast[place] - usual[place]), float(truth[place] - usual[place])
                    both += WEIGHTS[row, column] * f * t
                    ours += WEIGHTS[row, column] * f * f
                    theirs += WEIGHTS[row, column] * t * t
            each.append(both / (ours * theirs) ** 0.5)
        assert found[f"acc_{name}"] == pytest.approx(float(np.mean(each)), rel=1e-12)


def test_the_truth_correlates_and_the_climatology_does_not():
    truth, usual = drawn(0), drawn(1)
    assert score(truth, truth, usual)["acc_z500"] == pytest.approx(1.0)
    assert score(2 * usual - truth, truth, usual)["acc_z500"] == pytest.approx(-1.0)
    assert score(usual, truth, usual)["acc_z500"] == 0.0
    assert score(usual + 3 * (truth - usual), truth, usual)["acc_t850"] == pytest.approx(1.0), "size does not count"


def test_fields_of_other_shape_are_refused():
    with pytest.raises(DataError, match="differ"):
        AnomalyCorrelation(["z500"], WEIGHTS).update(drawn(0), drawn(1), drawn(2)[:1], torch.ones(6, dtype=torch.bool))
